"""Computes the checksums that name the weights of a model, whatever layout it was trained at."""

from __future__ import annotations

from pathlib import Path

from esm2mega.checkpoint.tensor_filter import OPTIMIZER
from esm2mega.checkpoint.tensors import TensorReader, combined_sha256, tensor_sha256
from esm2mega.convert.formats.esm2mega import is_auxiliary
from esm2mega.convert.lazy_weights import Weights


def weights_sha256(checkpoint: Path) -> str:
    """Compute the checksum of a checkpoint that `esm2mega inspect` prints as ``weights sha256``."""
    reader = TensorReader(checkpoint)
    names = (name for name in reader.index if not name.startswith(OPTIMIZER))
    return combined_sha256((name, tensor_sha256(reader.read(name))) for name in names)


def foreign_sha256(weights: Weights) -> str:
    """Compute the checksum of weights in another format, without what is kept beside a model."""
    is_beside = is_auxiliary(weights.description)
    return combined_sha256(
        (name, tensor_sha256(weights.read(name))) for name in weights.infos if not is_beside(name)
    )
