"""Whole tensors of a checkpoint, read without a model."""

from __future__ import annotations

from pathlib import Path

import torch

from esm2mega.checkpoint.tensors import TensorReader


def full_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, optimizer included."""
    reader = TensorReader(checkpoint)
    return reader.read_many(reader.index)


def full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same without the optimizer, which is not read."""
    reader = TensorReader(checkpoint)
    return reader.read_many(name for name in reader.index if not name.startswith("optimizer."))
