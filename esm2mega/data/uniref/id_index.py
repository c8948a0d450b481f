"""Finds ids among hundreds of millions on disk, in memory that does not grow with their number.

    ids.bin       the ids back to back
    ids.ends      int64 [n], where each ends
    ids.entries   uint64 [n], sorted: the hash of an id in the upper bits, its number in the lower ones

With n ids, b bits hold a number and 64 - b bits are left for the hash: 36 of them for 2 * 10**8 ids. Some ids
share so short a hash; every hit is compared with the id itself, so what is found is always right.

Everything is memory-mapped: the text and 16 bytes per id, which the kernel keeps while there is room and
drops when there is none. All files are written the ordinary way before they are mapped for changing: a full
disk is then an error, where writing to a hole of a mapped file would kill the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_BLOCK = 1 << 16
"""Loops over all ids handle this many at once."""

_hash_of = hash
"""For `bytes` this is 64-bit SipHash, which differs between processes; no index outlives its process."""


class IdFile:
    """Keeps ids in the order in which they were appended; their numbers count from 0."""

    def __init__(self, directory: Path) -> None:
        """Open files for appending in `directory`, which is made."""
        directory.mkdir(parents=True)
        self._directory = directory
        self._text_file = open(directory / "ids.bin", "xb")  # noqa: SIM115, closed by close()
        self._ends_file = open(directory / "ids.ends", "xb")  # noqa: SIM115, closed by close()
        self._end = 0
        self._count = 0

    def append(self, ids: Sequence[bytes]) -> None:
        """Append n ids, none of which may be empty."""
        self._text_file.write(b"".join(ids))
        ends = np.cumsum(np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))) + self._end
        self._ends_file.write(ends.tobytes())
        self._end = int(ends[-1]) if len(ids) else self._end
        self._count += len(ids)

    def close(self) -> None:
        """End appending; from now on ids can be read."""
        self._text_file.close()
        self._ends_file.close()
        self._text = map_array(self._directory / "ids.bin", np.uint8)
        self._ends = map_array(self._directory / "ids.ends", np.int64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> bytes:
        start, end = self._bounds(np.array([number]))
        return self._text[start[0] : end[0]].tobytes()

    def range(self, first: int, last: int) -> list[bytes]:
        """Return the ids with the numbers `first` to `last - 1`."""
        if first >= last:
            return []
        starts, ends = self._bounds(np.arange(first, last))
        text = self._text[starts[0] : ends[-1]].tobytes()
        bounds = zip((starts - starts[0]).tolist(), (ends - starts[0]).tolist(), strict=True)
        return [text[start:end] for start, end in bounds]

    def blocks(self) -> Iterator[tuple[int, list[bytes]]]:
        """Yield all ids in order, block by block: the number of the first id, and the ids."""
        for first in range(0, len(self), _BLOCK):
            yield first, self.range(first, min(first + _BLOCK, len(self)))

    def _bounds(self, numbers: Integers) -> tuple[Integers, Integers]:
        return np.where(numbers > 0, self._ends[numbers - 1], 0), self._ends[numbers]


class IdIndex(IdFile):
    """Looks up the numbers of ids once it is closed; of equal ids, which are allowed, it finds the first."""

    def close(self) -> None:
        """End appending and sort the index."""
        super().close()
        bits = max(len(self) - 1, 0).bit_length()
        self._number_mask = np.uint64(2**bits - 1)
        path = self._directory / "ids.entries"
        with open(path, "xb") as file:
            for first, ids in self.blocks():
                numbers = np.arange(first, first + len(ids), dtype=np.uint64)
                file.write((self._keys(ids) | numbers).tobytes())
        entries = map_array(path, np.uint64, mode="r+")
        entries.sort()  # in place: numpy sorts integers without extra memory of their size
        self._entries = entries

    def _keys(self, ids: Sequence[bytes]) -> npt.NDArray[np.uint64]:
        """Return the upper bits of the hashes, [n], with zeros in place of numbers."""
        hashes = np.fromiter(map(_hash_of, ids), dtype=np.int64, count=len(ids))
        return hashes.view(np.uint64) & ~self._number_mask

    def find(self, ids: Sequence[bytes]) -> Integers:
        """Return the number of each of n ids, [n]: the smallest among equal ids, or -1 for an unknown id."""
        found = np.full(len(ids), -1, dtype=np.int64)
        if not len(ids) or not len(self):
            return found
        keys = self._keys(ids)
        queries = _Joined(ids)
        pending = np.argsort(keys)  # neighbours in the index are looked up together
        places = np.searchsorted(self._entries, keys[pending])
        # Each turn tries one entry for every id that is still open; nearly all end in the first two.
        while len(pending):
            inside = places < len(self)
            pending, places = pending[inside], places[inside]
            entries = self._entries[places]
            similar = (entries & ~self._number_mask) == keys[pending]
            pending, places, entries = pending[similar], places[similar], entries[similar]
            numbers = (entries & self._number_mask).astype(np.int64)
            equal = queries.equal(pending, self._text, *self._bounds(numbers))
            found[pending[equal]] = numbers[equal]
            pending, places = pending[~equal], places[~equal] + 1
        return found

    def repeats(self) -> tuple[int, int, int] | None:
        """Find the first id that repeats an earlier one.

        Returns:
            The number of that id, the number of the equal id before it, and how many ids repeat an earlier
            one; None when all ids differ.
        """
        count, smallest, earlier = 0, len(self), -1
        for first in range(0, len(self), _BLOCK):
            # The entry in front of the block is the neighbour of the block's first one.
            entries = self._entries[max(first - 1, 0) : first + _BLOCK]
            hashes = entries & ~self._number_mask
            similar = entries[1:][hashes[1:] == hashes[:-1]]
            numbers = (similar & self._number_mask).astype(np.int64)
            if not len(numbers):
                continue
            before = self.find([self[number] for number in numbers.tolist()])
            repeated = before < numbers
            count += int(repeated.sum())
            if repeated.any() and numbers[repeated].min() < smallest:
                at = int(np.argmin(np.where(repeated, numbers, len(self))))
                smallest, earlier = int(numbers[at]), int(before[at])
        return (smallest, earlier, count) if count else None


class _Joined:
    """Holds many byte strings in one array, to compare them with others without a loop."""

    def __init__(self, strings: Sequence[bytes]) -> None:
        self._text = np.frombuffer(b"".join(strings), dtype=np.uint8)
        self._lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
        self._starts = np.cumsum(self._lengths) - self._lengths

    def equal(
        self, chosen: Integers, text: npt.NDArray[np.uint8], starts: Integers, ends: Integers
    ) -> npt.NDArray[np.bool_]:
        """Return whether each chosen string equals the piece of `text` from its start to its end, [n]."""
        equal = self._lengths[chosen] == ends - starts
        lengths = self._lengths[chosen[equal]]
        if not len(lengths):
            return equal
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ours = self._text[np.repeat(self._starts[chosen[equal]], lengths) + within]
        theirs = text[np.repeat(starts[equal], lengths) + within]
        equal[equal] = np.logical_and.reduceat(ours == theirs, np.cumsum(lengths) - lengths)
        return equal


def map_array(path: Path, dtype: npt.DTypeLike, mode: Any = "r") -> npt.NDArray[Any]:
    """Map a file of numbers into memory as a plain array; an empty file is an empty array."""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode=mode).view(np.ndarray)
