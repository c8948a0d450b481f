"""Reads single whole tensors of a checkpoint, in one process, without building a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.digests import CURE, DIGESTS, unreadable
from esm2mega.checkpoint.safe_index import checked_index
from esm2mega.checkpoint.zip_crc import Piece, check_crcs, is_zip
from esm2mega.errors import DamagedError, UserError


@dataclass(frozen=True)
class TensorInfo:
    """Holds the shape and dtype of a whole tensor, whatever layout wrote its pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def os_error_in(error: BaseException) -> OSError | None:
    """Return the system's error behind one that a reader or writer of PyTorch raised, if there is one."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return os_error_in(next(iter(error.failures.values()))[0])
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _damage_in(error: BaseException) -> DamagedError | None:
    """Return the damage that a reader found, behind what PyTorch made of it."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return _damage_in(next(iter(error.failures.values()))[0])
    return error if isinstance(error, DamagedError) else None


def tensor_sha256(value: torch.Tensor) -> str:
    """Return the SHA-256 of the bytes of a tensor on the CPU, in hexadecimal."""
    # As bytes: numpy has no bfloat16.
    return hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def combined_sha256(digests: Iterable[tuple[str, str]]) -> str:
    """Return one checksum of many tensors: SHA-256 over lines of name and `tensor_sha256`, in this order."""
    whole = hashlib.sha256()
    for name, digest in digests:
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


class TensorReader:
    """Reads the tensors of one checkpoint by name.

    Layers are stacked: axis 0 of ``encoder.layers.…`` is the number of the layer.
    """

    def __init__(self, checkpoint: Path, folder: str = layout.MODEL) -> None:
        """Open the tensors in `folder` of `checkpoint`, a complete ``step_XXXXXXXX`` directory."""
        self._model_dir = checkpoint / folder
        index = checked_index(self._model_dir)
        # Where there are digests, the files have been compared with these.
        self._reader = _Reader(self._model_dir, index, with_crcs=not (checkpoint / DIGESTS).exists())
        self.index: dict[str, TensorInfo] = {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(index.state_dict_metadata.items())
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Return the whole tensor `name`, or only entry `layer` of its axis 0, on the CPU.

        Raises:
            UserError: There is no such tensor, or its data cannot be read.
        """
        info = self._info(name)
        shape = info.shape if layer is None else (1, *info.shape[1:])
        state = {name: torch.empty(shape, dtype=info.dtype)}
        self._fill(state, name, None if layer is None else _OneLayer(layer))
        return state[name] if layer is None else state[name][0]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return whole tensors by name, on the CPU, read in one pass over the files.

        Raises:
            UserError: There is no tensor of one of these names, or the data cannot be read.
        """
        infos = {name: self._info(name) for name in names}
        state = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
        self._fill(state, f"one of {len(state)} tensors")
        return state

    def _info(self, name: str) -> TensorInfo:
        if name not in self.index:
            raise UserError(f"{self._model_dir}: no tensor {name}; esm2mega inspect lists what there is")
        return self.index[name]

    def _fill(self, state: dict[str, torch.Tensor], what: str, planner: LoadPlanner | None = None) -> None:
        try:
            dcp.load(state, storage_reader=self._reader, planner=planner, no_dist=True)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            if (damage := _damage_in(error)) is not None:
                raise damage from error
            if (cause := os_error_in(error)) is not None:
                path = self._model_dir / Path(cause.filename or "").name
                raise unreadable(path, cause) from error
            raise DamagedError(self._model_dir, f"is damaged: {what} cannot be read", CURE) from error


class _Reader(FileSystemReader):
    """Reads tensors by the index that was read and checked already, and may compare CRCs."""

    def __init__(self, model_dir: Path, index: Metadata, with_crcs: bool) -> None:
        """Take the index; `with_crcs` compares each piece, once, before it is used."""
        super().__init__(model_dir)
        self._index, self._with_crcs = index, with_crcs
        self._compared: set[tuple[str, int]] = set()

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        place = (sinfo.relative_path, sinfo.offset)
        if self._with_crcs and place not in self._compared:
            piece = Piece(file, sinfo.offset, sinfo.length)
            try:
                if is_zip(piece):
                    check_crcs(piece)
            except ValueError as error:
                path = Path(self.path) / sinfo.relative_path
                raise DamagedError(path, f"is damaged: {error}", CURE) from error
            self._compared.add(place)
        return super()._slice_file(file, sinfo)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _OneLayer(DefaultLoadPlanner):
    """Reads one entry of axis 0 into a tensor of shape ``[1, …]``, so that no other is ever in memory."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            offsets = torch.Size([self._layer] + [0] * (tensor.dim() - 1))
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=tensor.size())
            items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]
