"""Reads the values beside the tensors as Megatron-Core 0.19 stores them, for a version with a file for them.

Settings and counters of the optimizer are no tensors. Megatron-Core 0.16 writes them to ``common.pt``; 0.19
writes them between the tensors, under a name of their own, and reads either. So does this package.
"""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

NAME = "common_state"
"""Is the name of the values among those of the tensors."""

_STORED = f"{NAME}/shard_0_1"
_FILE = "common.pt"


def load_options(model_dir: Path, index: Metadata) -> dict[str, Any]:
    """Return arguments of ``dist_checkpointing.load`` by which this version finds the values.

    Args:
        model_dir: Directory of the tensors.
        index: Its index, which was checked.
    """
    has_file = (model_dir / _FILE).exists()
    if has_file or _STORED not in index.state_dict_metadata or _reads_them():
        return {}
    # A later version has no such module.
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class AmongTensors(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
            return _read(model_dir, index)

    return {"common_strategy": AmongTensors()}


def _reads_them() -> bool:
    return "common_strategy" not in inspect.signature(dist_checkpointing.load).parameters


def _read(model_dir: Path, index: Metadata) -> dict[str, Any]:
    """Read the values, without running what a pickle asks for.

    PyTorch's reader of checkpoints would, so only the place of the bytes is taken from the index.
    """
    place = index.storage_data[MetadataIndex(_STORED)]
    with (model_dir / Path(place.relative_path).name).open("rb") as file:
        file.seek(place.offset)
        content = io.BytesIO(file.read(place.length))
    (values,) = torch.load(content, map_location="cpu", weights_only=True)
    return dict(values)
