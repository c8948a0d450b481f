"""Refuses the index of a checkpoint if reading the index would run code.

``torch.distributed.checkpoint`` stores its index, ``.metadata``, as a pickle and reads it without an
allow-list. The file is therefore opened here first, under a list of the few classes that an honest index is
made of. The unpickler is the library's in Python: that in C, with which PyTorch reads, makes a table as long
as the largest number under which a pickle keeps an object, and a few bytes can name 4 billion.
"""

from __future__ import annotations

import enum
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.checkpoint.metadata import Metadata

from esm2mega.checkpoint.digests import CURE, unreadable
from esm2mega.errors import DamagedError, UserError

# Exact names: a whole module would let a pickle call any function in it.
_ALLOWED = {
    # the directory of the checkpoint, if the writer was given a path and not a string
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
}
_DTYPES = ("bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")


class _Refused(Exception):
    """Reports that the file asks for a name which is not on the list."""


def _member(kind: Any, name: Any = None) -> Any:
    """Rebuild a member of an enumeration, which some Pythons, 3.11.2 among them, store as a `getattr`."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise _Refused("builtins.getattr")
    return kind[name]


class _Memo(dict[int, Any]):
    """Holds what a pickle keeps, under numbers no larger than the number of its bytes."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self._num_bytes = num_bytes

    def __setitem__(self, number: int, kept: Any) -> None:
        if number > self._num_bytes:
            raise ValueError(f"it keeps an object under the number {number}")
        super().__setitem__(number, kept)


class _AllowList(pickle._Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.memo = _Memo(os.fstat(file.fileno()).st_size)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")


def checked_index(model_dir: Path) -> Metadata:
    """Return what ``.metadata`` of `model_dir` holds, which is an index of tensors and nothing else.

    Raises:
        UserError: It would load something else.
        DamagedError: It is no index, or missing.
        MachineError: It cannot be read.
    """
    path = model_dir / ".metadata"
    try:
        with path.open("rb") as file:
            index = _AllowList(file).load()
        if not isinstance(index, Metadata):
            raise TypeError(f"a {type(index).__name__}")
        return index
    except OSError as error:
        raise unreadable(path, error) from error
    except _Refused as error:
        raise UserError(
            f"{path}: refused: it would load {error}; only tensor indices are allowed in it"
        ) from error
    except Exception as error:
        # Damaged bytes make a pickle ask for anything: memory, absent attributes, impossible sizes.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedError(path, f"is damaged: not an index of tensors ({reason})", CURE) from error
