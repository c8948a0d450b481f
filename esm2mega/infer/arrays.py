"""Places large arrays in one file, whose rows any process may write in any order.

Shapes are known before anything is computed, so every row has its place from the start: processes write
straight to where the result belongs, and writing the same row again does no harm.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64
_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class ArraySpec:
    """Describes one array by shape and dtype; it is written in pieces along axis 0."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape[1:], dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * self.shape[0]


def plain_offsets(specs: Mapping[str, ArraySpec]) -> dict[str, int]:
    """Return the byte at which each array begins in a file that holds nothing but these arrays."""
    offsets, end = {}, 0
    for name, spec in specs.items():
        offsets[name] = end
        end += -(-spec.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets


class WrittenRows:
    """Collects which rows of which arrays were written, in any order."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def add(self, name: str, first: int, stop: int) -> None:
        """Note rows of an array, from `first` to `stop`, exclusive."""
        self._spans.setdefault(name, []).append((first, stop))

    @classmethod
    def joined(cls, parts: Iterable[WrittenRows]) -> WrittenRows:
        """Return the rows of all parts."""
        whole = cls()
        for part in parts:
            for name, spans in part._spans.items():
                whole._spans.setdefault(name, []).extend(spans)
        return whole

    def spans(self) -> dict[str, list[list[int]]]:
        """Return the rows of each array as few spans, ascending, by the name of the array."""
        found: dict[str, list[list[int]]] = {}
        for name in sorted(self._spans):
            merged = found[name] = []
            for first, stop in sorted(self._spans[name]):
                if merged and first <= merged[-1][1]:
                    merged[-1][1] = max(merged[-1][1], stop)
                else:
                    merged.append([first, stop])
        return found


class ArrayFile:
    """Opens an existing file with arrays for reading and writing; use it as a context, which closes it."""

    def __init__(self, path: Path, specs: Mapping[str, ArraySpec], offsets: Mapping[str, int]) -> None:
        """Open the file.

        Args:
            path: The existing file.
            specs: Shape and dtype of each array.
            offsets: Byte in the file where each array begins.
        """
        self._path, self.specs, self.offsets = path, specs, offsets
        self._descriptor = os.open(path, os.O_RDWR)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def write(self, name: str, row: int, values: npt.NDArray[Any]) -> None:
        """Write rows from `row` on; `values` has the array's dtype, and its shape after axis 0."""
        spec = self.specs[name]
        assert values.dtype == np.dtype(spec.dtype) and values.shape[1:] == spec.shape[1:], (
            name,
            values.shape,
        )
        assert 0 <= row <= row + len(values) <= spec.shape[0], (name, row)
        rest = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        position = self.offsets[name] + row * spec.row_bytes
        while rest:
            written = os.pwrite(self._descriptor, rest, position)
            rest, position = rest[written:], position + written

    def sync(self) -> None:
        """Bring everything that was written to the disk, and return when it is there."""
        os.fsync(self._descriptor)

    def sha256(self, spans: Mapping[str, Sequence[Sequence[int]]]) -> str | None:
        """Return the SHA-256 of rows as they are in the file; None if there are no such rows.

        Args:
            spans: The rows, as from `WrittenRows.spans`.
        """
        found = hashlib.sha256()
        for name, rows in spans.items():
            spec = self.specs.get(name)
            if spec is None or not all(0 <= first <= stop <= spec.shape[0] for first, stop in rows):
                return None
            for first, stop in rows:
                position = self.offsets[name] + first * spec.row_bytes
                end = self.offsets[name] + stop * spec.row_bytes
                while position < end:
                    piece = os.pread(self._descriptor, min(_READ_AT_ONCE, end - position), position)
                    if not piece:
                        return None
                    found.update(piece)
                    position += len(piece)
        return found.hexdigest()

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return the whole array as a memory map."""
        spec = self.specs[name]
        if not spec.num_bytes:
            return np.empty(spec.shape, dtype=spec.dtype)
        return np.memmap(self._path, spec.dtype, "r", self.offsets[name], spec.shape).view(np.ndarray)
