"""Reads the named tensors of files one at a time: shapes and dtypes at once, values when asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo, TensorReader
from esm2mega.errors import UserError
from esm2mega.files import parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LAYERS = "encoder.layers."


class TensorStore(Protocol):
    """Declares what every kind of storage offers."""

    location: Path
    infos: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Return the whole tensor `name` on the CPU, in memory of its own or mapped from the file."""


class SafetensorsStore:
    """Reads one safetensors file or several, with each tensor in one of them."""

    def __init__(self, location: Path, files: list[Path]) -> None:
        """Open all `files` of one model; `location` is named in errors."""
        self.location = location
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping: it has no iterator)
                    entry = file.get_slice(name)
                    dtype = _DTYPES.get(entry.get_dtype())
                    if name in self._files:
                        raise UserError(
                            f"{path}: holds {name}, as {self._files[name].name} does; copy all again"
                        )
                    if dtype is None:
                        raise UserError(f"{path}: {name} has dtype {entry.get_dtype()}, which is not known")
                    self.infos[name] = TensorInfo(tuple(entry.get_shape()), dtype)
                    self._files[name] = path

    def file_names(self) -> dict[str, str]:
        """Return the name of the file that each tensor is in."""
        return {name: path.name for name, path in self._files.items()}

    def read(self, name: str) -> Tensor:
        # Opened anew and copied: the pages of a mapping that stays open count as memory of the process.
        with _opened(self._files[name]) as file:
            return file.get_tensor(name).clone()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def safetensors_of(path: Path) -> SafetensorsStore | None:
    """Open a safetensors file, or ``model.safetensors`` of a directory or its shards; None if there is none.

    Raises:
        UserError: A file is not readable, is one shard of several, or does not fit the index.
    """
    if path.is_file():
        refuse_shard(path)
        return SafetensorsStore(path, [path]) if path.suffix == ".safetensors" else None
    directory = path
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return SafetensorsStore(directory, [single])
    if not index.is_file():
        return None
    store = SafetensorsStore(directory, shards(index))
    named, held = read_index(index), store.file_names()
    if wrong := sorted(name for name in {**named, **held} if named.get(name) != held.get(name)):
        name = wrong[0]
        raise UserError(
            f"{index}: does not fit its files: {name} is in {held.get(name, 'none')}, by the index in "
            f"{named.get(name, 'none')}; download all of them again"
        )
    return store


def refuse_shard(path: Path) -> None:
    """Raise `UserError` for a file that holds a part of a model."""
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise UserError(f"{path}: is one shard of a model; give the directory of all of them, {path.parent}")


def read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor from an index of Hugging Face.

    Raises:
        UserError: The file is not such an index.
    """
    try:
        named = parse_json(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not an index of shards ({error})") from error
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index}: not an index of shards (weight_map is no table of names)")
    return named


def shards(index: Path) -> list[Path]:
    """Return the files that an index of Hugging Face names, which must lie beside it.

    Raises:
        UserError: It is not such an index, a file is missing, or a name leads elsewhere.
    """
    names = sorted(set(read_index(index).values()))
    files = [index.parent / name for name in names if Path(name).name == name]
    if len(files) != len(names):
        raise UserError(f"{index}: refused: names a file outside its directory")
    for path in files:
        if not path.is_file():
            raise UserError(f"{index}: names {path.name}, which is missing; copy all shards")
    return files


class MemoryStore:
    """Holds tensors that are loaded already, such as those of an unpickled and memory-mapped file."""

    def __init__(self, location: Path, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors by name; `location` is named in errors."""
        self.location = location
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self._tensors = tensors

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


_WRAPPERS = ("module.", "model.", "_orig_mod.")
"""Wrappers of PyTorch and Lightning put these before the names of all tensors of a model."""


class UnprefixedStore:
    """Gives the tensors of another store under names without a prefix that all of them have."""

    def __init__(self, store: TensorStore, prefix: str) -> None:
        """Take `prefix` off the names of `store`."""
        self.location = store.location
        self.infos = {name.removeprefix(prefix): info for name, info in store.infos.items()}
        self._store, self._prefix = store, prefix

    def read(self, name: str) -> Tensor:
        return self._store.read(self._prefix + name)


def without_shared_prefix(
    store: TensorStore, wrappers: Sequence[str] = _WRAPPERS
) -> tuple[TensorStore, list[str]]:
    """Take off the prefixes that a wrapper of the model put before the names of all its tensors.

    Args:
        store: The tensors.
        wrappers: The prefixes to look for, of which there may be several, one before the other.

    Returns:
        The tensors under the names of the model itself, and a note for the user if there was a prefix.
    """
    prefix = ""
    while store.infos and (found := _shared(store.infos, prefix, wrappers)):
        prefix += found
    if not prefix:
        return store, []
    return UnprefixedStore(store, prefix), [f"{prefix}: the prefix of the names of all tensors"]


def _shared(names: Iterable[str], prefix: str, wrappers: Sequence[str]) -> str:
    """Return the wrapper that stands behind `prefix` in all names; empty if none does."""
    return next((w for w in wrappers if all(name.startswith(prefix + w) for name in names)), "")


class DistributedStore:
    """Reads weights in Megatron-Core's distributed format, without the optimizer, one layer at a time."""

    def __init__(self, checkpoint: Path, folder: str, prefix: str = "") -> None:
        """Open the tensors in `folder` of the directory `checkpoint`; their names lose `prefix`."""
        self.location = checkpoint
        self._reader = TensorReader(checkpoint, folder)
        self.infos: dict[str, TensorInfo] = {}
        self._entries: dict[str, tuple[str, int | None]] = {}
        for stored, info in self._reader.index.items():
            name = stored.removeprefix(prefix)
            if stored.startswith("optimizer."):
                continue
            if name.startswith(_LAYERS) and not re.match(rf"{re.escape(_LAYERS)}\d+\.", name):
                for layer in range(info.shape[0]):
                    one = f"{_LAYERS}{layer}.{name.removeprefix(_LAYERS)}"
                    self.infos[one] = TensorInfo(info.shape[1:], info.dtype)
                    self._entries[one] = (stored, layer)
            else:
                self.infos[name] = info
                self._entries[name] = (stored, None)

    def read(self, name: str) -> Tensor:
        return self._reader.read(*self._entries[name])


class JoinedStore:
    """Joins several stores with different names into one."""

    def __init__(self, location: Path, stores: Sequence[TensorStore]) -> None:
        """Join `stores`; `location` is named in errors."""
        self.location = location
        self._owners = {name: store for store in stores for name in store.infos}
        self.infos = {name: store.infos[name] for name, store in self._owners.items()}

    def read(self, name: str) -> Tensor:
        return self._owners[name].read(name)
