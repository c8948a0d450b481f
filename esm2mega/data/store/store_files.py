"""Writes the files of a token store, hashed as they grow, with index arrays of any length.

No array as long as the store is kept in memory: numbers whose count is not known yet go to a spool, which is
a temporary file, and from there block by block into the file that is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 20
"""Arrays are handled in blocks of this many numbers."""


class HashedFile:
    """Writes a new file, and returns its size and SHA-256 when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115, closed by close() or abandon()
        self.sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        """Flush the file to disk, close it, and return its entry in the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "sha256": self.sha256.hexdigest()}

    def abandon(self) -> None:
        """Close the file, which is to be removed, without regard to errors."""
        with contextlib.suppress(OSError):  # on a full disk the flush fails too
            self._file.close()


class NumberSpool:
    """Collects any number of integers in a temporary file, so that memory stays constant at UniRef90 size."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._file = open(path, "xb")  # noqa: SIM115, closed by close() or abandon()

    def append(self, numbers: npt.NDArray[np.integer[Any]]) -> None:
        self._file.write(numbers.astype(self._dtype).tobytes())

    def close(self) -> npt.NDArray[Any]:
        """End writing and return all numbers, [n], as a memory map of the file, whose name is removed."""
        self._file.close()
        if not self._path.stat().st_size:  # an empty file cannot be mapped
            self._path.unlink()
            return np.zeros(0, self._dtype)
        numbers = np.memmap(self._path, dtype=self._dtype, mode="r")
        self._path.unlink()
        return numbers.view(np.ndarray)

    def abandon(self) -> None:
        """Close the temporary file without regard to errors."""
        with contextlib.suppress(OSError):
            self._file.close()


def offset_blocks(lengths: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield, block by block, where each item, [n], begins when all lie back to back."""
    end = 0
    for first in range(0, len(lengths), BLOCK):
        ends = np.cumsum(lengths[first : first + BLOCK], dtype=np.int64) + end
        yield ends - lengths[first : first + BLOCK]
        end = int(ends[-1])


def npy_header(file: HashedFile, count: int) -> None:
    """Begin a `.npy` file of `count` int64 numbers."""
    header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def write_offsets(path: Path, lengths: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Write where each of n items begins and where the last one ends, int64 [n + 1].

    Returns:
        The file's entry in the manifest.
    """
    offsets = HashedFile(path)
    npy_header(offsets, len(lengths) + 1)
    for starts in offset_blocks(lengths):
        offsets.write(starts.astype("<i8").tobytes())
    offsets.write(struct.pack("<q", int(lengths.sum(dtype=np.int64))))
    return offsets.close()
