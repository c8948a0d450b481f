"""Writes safetensors files tensor by tensor; the library's own writer needs all of them in memory.

The format (https://github.com/huggingface/safetensors): the length of the header as 8 bytes, little-endian;
the header, JSON from name to dtype, shape and byte range; the values, back to back in that order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def write_safetensors(path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
    """Write one safetensors file.

    Args:
        path: File to make.
        infos: Names, shapes and dtypes in the order of the file.
        read: Returns a tensor by name; called for one name at a time, in that order.

    Raises:
        OSError: The disk is full, or the file cannot be written for another reason.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        begin, end = end, end + info.num_bytes
        header[name] = {"dtype": _CODES[info.dtype], "shape": info.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, info in infos.items():
            value = read(name)
            assert (tuple(value.shape), value.dtype) == (info.shape, info.dtype), name
            # As bytes: numpy has no bfloat16.
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def write_sharded(
    directory: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], shard_bytes: int
) -> None:
    """Write ``model.safetensors`` in `directory`, or shards with an index if it exceeds `shard_bytes`."""
    parts: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if parts[-1] and sum(i.num_bytes for i in parts[-1].values()) + info.num_bytes > shard_bytes:
            parts.append({})
        parts[-1][name] = info
    if len(parts) == 1:
        write_safetensors(directory / "model.safetensors", infos, read)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(directory / file_name, part, read)
        weight_map |= dict.fromkeys(part, file_name)
    totals = {
        "total_parameters": sum(torch.Size(info.shape).numel() for info in infos.values()),
        "total_size": sum(info.num_bytes for info in infos.values()),
    }
    index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
