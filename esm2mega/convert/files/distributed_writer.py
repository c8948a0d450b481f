"""Writes whole tensors in Megatron-Core's distributed format, which keeps the layers of a model in stacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.checkpoint.writer import StackedTensor, write_weights
from esm2mega.convert.name_table import LAYER


def write_distributed(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    num_layers: int,
    prefix: str = "",
) -> None:
    """Make the directory `folder` with all tensors of a model, one after the other.

    Args:
        folder: Directory to make.
        infos: Shape and dtype of each tensor under its name; that of a layer's tensor holds its number.
        read: Returns the value of a tensor by name; called when it is written.
        num_layers: Number of layers; each of them has the same tensors.
        prefix: Text before all stored names.

    Raises:
        OSError: The disk is full, or a file cannot be written for another reason.
    """
    whole: dict[str, StackedTensor] = {}
    for name, info in infos.items():
        stacked, layer = stacked_name(name)
        layers = None if layer is None else num_layers
        shape = info.shape if layers is None else (layers, *info.shape)
        whole[prefix + stacked] = StackedTensor(TensorInfo(shape, info.dtype), layers)

    def read_chunk(stored: str, layer: int | None) -> Tensor:
        name = stored.removeprefix(prefix)
        return read(name if layer is None else name.replace("encoder.layers.", LAYER.format(n=layer), 1))

    write_weights(folder, whole, read_chunk)


def stacked_name(name: str) -> tuple[str, int | None]:
    """Return the stored name of a tensor, without the layer, and the layer or None."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
    return (f"encoder.layers.{match[2]}", int(match[1])) if match else (name, None)
