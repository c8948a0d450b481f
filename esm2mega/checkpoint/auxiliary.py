"""Keeps tensors that belong to a model and are not trained with it, such as ESM-2's contact head.

They lie in ``auxiliary.safetensors`` beside ``model/`` and pass through training unchanged. Known names, with
``h`` for the hidden size:

- ``contact_head.regression.weight`` ``[1, layers * heads]`` and ``.bias`` ``[1]``: the logistic regression on
  attention maps of ESM-2, layer-major.
- ``pooler.dense.weight`` ``[h, h]`` and ``.bias`` ``[h]``: the pooler of TAPE's models.
- ``encoder.final_layernorm.weight`` ``[h]`` and ``.bias`` ``[h]``: in a model that does not apply it, such as
  ProteinLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esm2mega.checkpoint.digests import CURE, unreadable
from esm2mega.errors import DamagedError

AUXILIARY = "auxiliary.safetensors"


def read_auxiliary(checkpoint: Path) -> dict[str, Tensor]:
    """Return all auxiliary tensors of a checkpoint by name; most checkpoints have none."""
    path = checkpoint / AUXILIARY
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise DamagedError(path, f"is damaged ({error})", CURE) from error


def write_auxiliary(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write auxiliary tensors into a checkpoint that is being written; without any, no file is made."""
    if tensors:
        save_file({name: value.contiguous() for name, value in tensors.items()}, checkpoint / AUXILIARY)
