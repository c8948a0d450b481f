"""Writes the weights of a checkpoint tensor by tensor, in one process, without a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from esm2mega.checkpoint.tensors import TensorInfo

# What Megatron-Core 0.16 to 0.19 write into a directory of their torch_dist format beside the tensors.
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class StackedTensor:
    """Describes a whole tensor: `num_layers` entries along axis 0, or None where it is in one piece."""

    info: TensorInfo
    num_layers: int | None


def write_weights(
    model_dir: Path, tensors: Mapping[str, StackedTensor], read: Callable[[str, int | None], Tensor]
) -> None:
    """Write `tensors` in the distributed format, as Megatron-Core writes them: one chunk for each layer.

    Args:
        model_dir: Directory to make.
        tensors: Names, whole shapes and dtypes.
        read: Returns a chunk by name and layer (None: the whole tensor); called when the chunk is written.

    Raises:
        OSError: The disk is full, or a file cannot be written for another reason.
        UserError: `read` raised it.
    """
    model_dir.mkdir(parents=True)
    # copy_ahead=0: on a machine with a GPU the writer would otherwise collect tensors before it writes them.
    writer = FileSystemWriter(str(model_dir), thread_count=1, per_thread_copy_ahead=0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=_Planner(tensors, read), no_dist=True)
    except dcp.CheckpointException as error:
        failure = next(iter(error.failures.values()))[0] if error.failures else error
        raise failure from error
    # There are no values besides the tensors, but the loader opens this file.
    torch.save({}, model_dir / "common.pt")
    (model_dir / "metadata.json").write_text(json.dumps(_BACKEND))


class _Planner(DefaultSavePlanner):
    """Plans chunks from shapes alone, and reads their values while they are being written."""

    def __init__(
        self, tensors: Mapping[str, StackedTensor], read: Callable[[str, int | None], Tensor]
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = tensors
        self._read = read

    def create_local_plan(self) -> SavePlan:
        items = []
        for layer in range(max((t.num_layers or 0) for t in self._tensors.values())):
            items += [
                _chunk(name, stacked, layer)
                for name, stacked in self._tensors.items()
                if stacked.num_layers is not None and layer < stacked.num_layers
            ]
        items += [_chunk(name, s, None) for name, s in self._tensors.items() if s.num_layers is None]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        name, offset = write_item.index.fqn, write_item.index.offset
        stacked = self._tensors[name]
        if stacked.num_layers is None:
            return self._read(name, None).contiguous()
        assert offset is not None
        # [*] -> [1, *]
        return self._read(name, offset[0]).contiguous().unsqueeze(0)


def _chunk(name: str, stacked: StackedTensor, layer: int | None) -> WriteItem:
    shape = torch.Size(stacked.info.shape)
    offsets = torch.Size([layer or 0] + [0] * (len(shape) - 1))
    sizes = shape if layer is None else torch.Size((1, *shape[1:]))
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=stacked.info.dtype),
            size=shape,
        ),
    )
