"""Writes a long stream of bytes to files of limited size, and reads them as one array.

A stream is cut at exact multiples of the limit, wherever these fall: `cat` puts it together again. For
reading, the files are mapped to consecutive addresses, so that they appear as one array.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from esm2mega.errors import MachineError

SHARD_UNIT = 1 << 20
"""Limits are multiples of this, and so of any machine's page size: files must be mapped to whole pages."""

SHARD_BYTES = 16 << 30
"""This is the limit where none is given: any file system and any copying tool can handle such files."""

_MAP_FIXED = 0x10  # not among the constants of `mmap`; the same on Linux and BSD


class HashedFile(Protocol):
    """Writes a new file and hashes it; closing it returns its entry in a manifest."""

    sha256: hashlib._Hash

    def write(self, data: bytes | memoryview) -> None: ...
    def close(self) -> dict[str, Any]: ...
    def abandon(self) -> None: ...


def shard_name(name: str, number: int) -> str:
    """Return the name of a shard, such as `tokens-00000.bin` for `tokens.bin`."""
    stem, ending = os.path.splitext(name)
    return f"{stem}-{number:05d}{ending}"


class ShardWriter:
    """Writes `folder/name`, or `name-00000`, `name-00001`, … when it grows beyond the limit."""

    def __init__(self, folder: Path, name: str, limit: int, create: Callable[[Path], HashedFile]) -> None:
        """Create the first file.

        Args:
            folder: directory of the files.
            name: name of the file while it is the only one.
            limit: largest size of a file in bytes, a multiple of `SHARD_UNIT`.
            create: function that opens a new file.
        """
        self._folder, self._name, self._limit, self._create = folder, name, limit, create
        self._whole: hashlib._Hash | None = None  # hash of the stream, once it is more than one file
        self._closed: dict[str, dict[str, Any]] = {}
        self._bytes = 0
        self._file = create(folder / name)

    def write(self, data: bytes) -> None:
        """Append to the stream."""
        if self._whole is not None:
            self._whole.update(data)
        view = memoryview(data)
        while self._bytes + len(view) > self._limit:
            room = self._limit - self._bytes
            self._file.write(view[:room])
            view = view[room:]
            self._next_file(view)
        self._file.write(view)
        self._bytes += len(view)

    def close(self) -> tuple[dict[str, dict[str, Any]], str]:
        """Flush all files to disk; return the manifest's entries in order, and the SHA-256 of the stream."""
        number = len(self._closed)
        self._closed[shard_name(self._name, number) if number else self._name] = self._file.close()
        return self._closed, (self._whole or self._file.sha256).hexdigest()

    def abandon(self) -> None:
        """Close the file, which is to be removed, without regard to errors."""
        self._file.abandon()

    def _next_file(self, rest: memoryview) -> None:
        """Continue in another file; `rest` is the part of the data that did not fit into the last."""
        if self._whole is None:
            self._whole = self._file.sha256.copy()
            self._whole.update(rest)
        number = len(self._closed)
        self._closed[shard_name(self._name, number)] = self._file.close()
        if not number:
            os.rename(self._folder / self._name, self._folder / shard_name(self._name, 0))
        self._file = self._create(self._folder / shard_name(self._name, number + 1))
        self._bytes = 0


def map_files(files: Sequence[Path]) -> npt.NDArray[np.uint8]:
    """Map the bytes of all files, one behind the other, to one read-only array, which loads what is touched.

    Args:
        files: files that are not empty; the size of each but the last is a multiple of `SHARD_UNIT`.
    """
    if len(files) == 1:
        return np.memmap(files[0], dtype=np.uint8, mode="r").view(np.ndarray)
    sizes = [file.stat().st_size for file in files]
    c = ctypes.CDLL(None, use_errno=True)
    c.mmap.restype = ctypes.c_void_p
    c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def map_at(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
        found = c.mmap(address, size, protection, flags, descriptor, 0)
        if found in (None, ctypes.c_void_p(-1).value):
            raise MachineError(
                f"{files[0].parent}: {sum(sizes)} bytes of files cannot be mapped "
                f"({os.strerror(ctypes.get_errno())}); is there a limit on virtual memory (ulimit -v)?"
            )
        return int(found)

    # Reserve a range of addresses without memory behind it, and then map file by file over it.
    start = map_at(None, sum(sizes), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    whole = (ctypes.c_uint8 * sum(sizes)).from_address(start)
    # Do not unmap at the exit of the interpreter, where threads may still be reading.
    weakref.finalize(whole, c.munmap, start, sum(sizes)).atexit = False
    address = start
    for file, size in zip(files, sizes, strict=True):
        with open(file, "rb") as stream:
            map_at(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, stream.fileno())
        address += size
    tokens = np.ctypeslib.as_array(whole)
    tokens.flags.writeable = False
    return tokens
