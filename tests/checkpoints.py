"""Whole tensors of a checkpoint, read without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.digests import write_digests
from esm2mega.checkpoint.tensors import TensorReader


def full_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, optimizer included."""
    reader = TensorReader(checkpoint)
    return reader.read_many(reader.index)


def full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same without the optimizer, which is not read."""
    reader = TensorReader(checkpoint)
    return reader.read_many(name for name in reader.index if not name.startswith("optimizer."))


def put_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Give a checkpoint another ``train_state.json``, and digests of its files as they are now."""
    layout.write_state(checkpoint, {name: value for name, value in state.items() if name != "sha256"})
    write_digests(checkpoint)
