"""Gives HDF5 outputs checksums, and compares them: one for each data set, and one for all around these.

Each data set has an attribute ``sha256``, over its dtype, its shape and its values as they are read, so that
it covers whatever HDF5 makes of the file. That of the file covers its attributes, and the names of the data
sets. Fletcher-32, HDF5's own checksum, is for data in chunks; large arrays are in one piece here, so that any
process can write rows of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esm2mega.errors import UserError
from esm2mega.infer.arrays import ArrayFile

CHECKSUM = "sha256"
"""Names the attribute of data sets and of the file."""

_RESERVED = "0" * 64
_BLOCK_BYTES = 1 << 24
_DAMAGES = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""Lists what h5py raises for a file whose structure is damaged."""


def seal(file: Any, reserved: Collection[str] = ()) -> None:
    """Write the checksums of a file in which all other things have been written.

    Args:
        file: The open file.
        reserved: Data sets whose values come later; `complete` fills in their checksums.
    """
    for name, data in _datasets(file):
        _put(data, _RESERVED if name in reserved else dataset_sha256(data))
    _put(file, _frame_sha256(file))


def complete(path: Path, arrays: ArrayFile) -> None:
    """Fill in the checksums that `seal` reserved, after comparing all others; it may be done again.

    A file that an earlier version began has none, and gets none.

    Args:
        path: The file.
        arrays: The same file, as the arrays were written into it.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with h5py.File(path, "r+") as file:
            if not _has_checksums(file):
                return
            _compare(path, file, arrays.specs.keys())
            for name, spec in arrays.specs.items():
                data = file[name]
                kind = h5py.h5t.py_create(np.dtype(spec.dtype), logical=True)
                place = None if not spec.num_bytes else arrays.offsets[name]
                if (data.shape, data.id.get_type(), data.id.get_offset()) != (spec.shape, kind, place):
                    raise _damaged(path, f"{name} is not what was reserved")
                _put(data, dataset_sha256(data))
    except _DAMAGES as error:
        raise _damaged(path, str(error)) from error


def verify(path: Path) -> bool:
    """Read a whole file, and compare it with its checksums.

    Returns:
        Whether it has any; outputs of earlier versions, and files of other programs, have none.

    Raises:
        UserError: It differs from them, or cannot be read.
    """
    try:
        with h5py.File(path) as file:
            if not _has_checksums(file):
                return False
            _compare(path, file)
            return True
    except _DAMAGES as error:
        raise _damaged(path, str(error)) from error


def dataset_sha256(data: Any) -> str:
    """Return the SHA-256 of a data set: of a line with dtype and shape, its attributes, and its values.

    Text is hashed as its length in 8 bytes, little-endian, and its bytes in UTF-8.
    """
    is_text = h5py.check_string_dtype(data.dtype) is not None
    kind = "text" if is_text else data.dtype.str
    found = hashlib.sha256(f"{kind} {data.shape} {_attributes(data)}\n".encode())
    row_bytes = max(1, int(np.prod(data.shape[1:], dtype=np.int64)) * data.dtype.itemsize)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for first in range(0, len(data), step):
        block = data[first : first + step]
        if is_text:
            for text in block:
                found.update(len(text).to_bytes(8, "little") + text)
        else:
            found.update(np.ascontiguousarray(block).data.cast("B"))
    return found.hexdigest()


def _has_checksums(file: Any) -> bool:
    return CHECKSUM in file.attrs or any(CHECKSUM in data.attrs for _, data in _datasets(file))


def _compare(path: Path, file: Any, reserved: Collection[str] = ()) -> None:
    """Raise `UserError` for the first thing that differs from its checksum."""
    if _taken(file) != _frame_sha256(file):
        raise _damaged(path, "its attributes or the names of its data sets differ from their checksum")
    for name, data in _datasets(file):
        if name not in reserved and _taken(data) != dataset_sha256(data):
            raise _damaged(path, f"{name} differs from its checksum")


def _frame_sha256(file: Any) -> str:
    content = f"{_attributes(file)}\n{json.dumps([name for name, _ in _datasets(file)])}\n"
    return hashlib.sha256(content.encode()).hexdigest()


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and data sets of a file, sorted by name."""
    names: list[str] = []
    file.visit(names.append)
    yield from ((name, item) for name in sorted(names) if isinstance(item := file[name], h5py.Dataset))


def _attributes(item: Any) -> str:
    """Return all attributes but the checksum as JSON."""
    values = {
        name: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for name, value in item.attrs.items()
        if name != CHECKSUM
    }
    return json.dumps(values, sort_keys=True, default=str)


def _put(item: Any, digest: str) -> None:
    # In place if it is there: the structure of the file does not change again.
    if CHECKSUM in item.attrs:
        item.attrs.modify(CHECKSUM, np.bytes_(digest))
    else:
        item.attrs.create(CHECKSUM, np.bytes_(digest))


def _taken(item: Any) -> str:
    return bytes(item.attrs[CHECKSUM]).decode("ascii")


def _damaged(path: Path, damage: str) -> UserError:
    return UserError(f"{path}: is damaged: {' '.join(damage.split())}; make it again with --overwrite")
