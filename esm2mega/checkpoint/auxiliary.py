"""Tensors that belong to a model and are not trained with it, such as the contact head of ESM-2.

They lie in ``auxiliary.safetensors`` beside ``model/`` and pass through training unchanged. Names known so
far: ``contact_head.regression.weight`` ``[1, layers * heads]`` and ``contact_head.regression.bias`` ``[1]``,
the logistic regression on attention maps of ESM-2, layer-major.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esm2mega.errors import UserError

AUXILIARY = "auxiliary.safetensors"


def read_auxiliary(checkpoint: Path) -> dict[str, Tensor]:
    """All auxiliary tensors of a checkpoint; most have none."""
    path = checkpoint / AUXILIARY
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the checkpoint is damaged") from error


def write_auxiliary(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write them into a growing checkpoint; no file if there are none."""
    if tensors:
        save_file({name: value.contiguous() for name, value in tensors.items()}, checkpoint / AUXILIARY)
