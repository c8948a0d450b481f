"""Single whole tensors out of a checkpoint, in one process, without building a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.metadata import check_metadata
from esm2mega.errors import UserError


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a whole tensor, whatever layout wrote its pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorReader:
    """Tensors of one checkpoint by name. Layers are stacked: axis 0 of ``encoder.layers.…`` is the layer
    number.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Args: checkpoint: a complete ``step_XXXXXXXX`` directory."""
        self._model_dir = checkpoint / layout.MODEL
        check_metadata(self._model_dir)
        self._reader = FileSystemReader(self._model_dir)
        entries = self._reader.read_metadata().state_dict_metadata
        self.index: dict[str, TensorInfo] = {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(entries.items())
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`, on the CPU.

        Raises:
            UserError: There is no such tensor, or its data cannot be read.
        """
        if name not in self.index:
            raise UserError(f"{self._model_dir}: no tensor {name}; esm2mega inspect lists what there is")
        info = self.index[name]
        state = {name: torch.empty(info.shape, dtype=info.dtype)}
        try:
            dcp.load(state, storage_reader=self._reader, no_dist=True)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            raise UserError(f"{self._model_dir}: {name} cannot be read; the checkpoint is damaged") from error
        return state[name]
