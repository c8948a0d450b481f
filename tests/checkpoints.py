"""Whole tensors of a checkpoint, read without a model, and checkpoints with other values in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.digests import DIGESTS, write_digests
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.checkpoint.writer import StackedTensor, write_weights


def full_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, optimizer included."""
    reader = TensorReader(checkpoint)
    return reader.read_many(reader.index)


def full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same without the optimizer, which is not read."""
    reader = TensorReader(checkpoint)
    return reader.read_many(name for name in reader.index if not name.startswith("optimizer."))


def changed_weights(
    checkpoint: Path, target: Path, changes: Mapping[str, Callable[[torch.Tensor], None]]
) -> Path:
    """A copy of a checkpoint, without its optimizer, with `changes` made to whole tensors in place."""
    values = full_weights(checkpoint)
    for name, change in changes.items():
        change(values[name])
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(layout.MODEL, DIGESTS))
    infos = {name: StackedTensor(info, None) for name, info in TensorReader(checkpoint).index.items()}
    infos = {name: info for name, info in infos.items() if name in values}
    write_weights(target / layout.MODEL, infos, lambda name, _: values[name])
    write_digests(target)
    return target


def put_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Give a checkpoint another ``train_state.json``, and digests of its files as they are now."""
    layout.write_state(checkpoint, {name: value for name, value in state.items() if name != "sha256"})
    write_digests(checkpoint)
