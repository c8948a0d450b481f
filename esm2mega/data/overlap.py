"""Finds proteins that two splits have in common, in memory that does not grow with either of them.

Whole sequences are compared, residue by residue. Of most proteins only the two ends are read: those that may
be equal to another one are compared as a whole.

Legend: ``n`` proteins of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from esm2mega.errors import UserError

_BLOCK = 1 << 18
"""Sets how many proteins are looked at together: some tens of megabytes."""

_END = 8
"""Sets how many residues of each end are read: as many bytes as a number has."""

_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))
"""These factors spread the bits of a key; a product with an odd number loses none."""

Keys = npt.NDArray[np.uint64]


class Sequences(Protocol):
    """Says what is needed of proteins, which are a `TokenStore` or labelled proteins in memory."""

    @property
    def path(self) -> Path: ...
    @property
    def tokens(self) -> npt.NDArray[np.uint8]: ...
    @property
    def starts(self) -> npt.NDArray[np.int64]: ...
    @property
    def lengths(self) -> npt.NDArray[Any]: ...
    def __len__(self) -> int: ...
    def id(self, row: int) -> str: ...
    def residues(self, row: int) -> npt.NDArray[np.uint8]: ...


def check_overlap(splits: Mapping[str, list[Any]], allowed: bool) -> list[str]:
    """Refuse splits that have proteins in common, unless that is allowed.

    Args:
        splits: Sets of `Sequences` by their key, such as ``data.train``, which may have several.
        allowed: Whether the user allowed it: `data.allow_overlap`.

    Returns:
        A line for each two sets with proteins in common.

    Raises:
        UserError: There are such sets, and it is not allowed.
    """
    lines = []
    for (key, sets), (held_key, held_sets) in combinations(splits.items(), 2):
        for held, others in ((held, others) for held in held_sets for others in sets):
            found = find_overlap(held, others)
            if found is None:
                continue
            line = (
                f"{_named(held_key, held)}: {found.count} of {len(held)} proteins are also in "
                f"{_named(key, others)}"
            )
            if not allowed:
                raise UserError(
                    f"{line}, the first is {held.id(found.row)!r} (there {others.id(found.other_row)!r}), so "
                    "its loss would not measure unseen proteins; take them out of one of the two, or set "
                    "data.allow_overlap=true"
                )
            lines.append(f"{line}, which data.allow_overlap=true allows")
    return lines


def _named(key: str, proteins: Sequences) -> str:
    """Name a split by key and path; lists of a program have no path, but the key in its place."""
    return key if str(proteins.path) == key else f"{key}={proteins.path}"


@dataclass(frozen=True)
class Overlap:
    """Says which proteins of one set are in another one too.

    Attributes:
        count: Number of proteins of the first set that are in the second one.
        row: Row of the first of them in the first set.
        other_row: Row of an equal protein in the second set.
    """

    count: int
    row: int
    other_row: int


def find_overlap(proteins: Sequences, others: Sequences) -> Overlap | None:
    """Return which of `proteins` are among `others`; None if none is."""
    count, first = 0, (-1, -1)
    for rows, keys in _blocks(proteins):
        known = np.sort(keys)
        # The digests of proteins are made when one of the others may be equal to one of them.
        digests: dict[bytes, list[int]] | None = None
        found: dict[bytes, int] = {}
        for other_rows, other_keys in _blocks(others):
            places = np.minimum(np.searchsorted(known, other_keys), len(known) - 1)
            for row in other_rows[known[places] == other_keys].tolist():
                if digests is None:
                    digests = {}
                    for own in rows.tolist():
                        digests.setdefault(_digest(proteins, own), []).append(own)
                digest = _digest(others, row)
                if digest in digests:
                    found.setdefault(digest, row)
        if found:
            assert digests is not None
            count += sum(len(digests[digest]) for digest in found)
            if first == (-1, -1):
                first = min((digests[digest][0], row) for digest, row in found.items())
    return Overlap(count, *first) if count else None


class KnownSequences:
    """Finds the proteins of some sets again in others, in memory of 24 bytes for each of them."""

    def __init__(self, sets: Iterable[Sequences]) -> None:
        """Read the ends of all proteins of the sets."""
        self._sets = list(sets)
        found = [
            (keys, np.full(len(rows), number), rows)
            for number, proteins in enumerate(self._sets)
            for rows, keys in _blocks(proteins)
        ]
        keys, owners, rows = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(keys, kind="stable")
        self._keys, self._owners, self._rows = keys[order], owners[order], rows[order]
        # Digests of the proteins whose keys were met, by the place of the first of each key.
        self._digests: dict[int, set[bytes]] = {}

    def contains(self, proteins: Sequences, rows: range) -> npt.NDArray[np.bool_]:
        """Return for each of the rows of `proteins` whether the protein is in one of the sets, ``[n]``."""
        keys = _keys(proteins, np.asarray(rows))
        begins = np.searchsorted(self._keys, keys)
        ends = np.searchsorted(self._keys, keys, side="right")
        known = np.zeros(len(rows), dtype=np.bool_)
        for place in np.flatnonzero(ends > begins).tolist():
            begin, end = int(begins[place]), int(ends[place])
            if begin not in self._digests:
                owned = zip(self._owners[begin:end].tolist(), self._rows[begin:end].tolist(), strict=True)
                self._digests[begin] = {_digest(self._sets[owner], row) for owner, row in owned}
            known[place] = _digest(proteins, rows[place]) in self._digests[begin]
        return known


def _blocks(proteins: Sequences) -> Iterator[tuple[npt.NDArray[np.int64], Keys]]:
    """Yield the rows of blocks of proteins, ``[n]``, and keys that are equal for equal proteins, ``[n]``."""
    for first in range(0, len(proteins), _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, len(proteins)))
        yield rows, _keys(proteins, rows)


def _keys(proteins: Sequences, rows: npt.NDArray[np.int64]) -> Keys:
    """Return keys of neighbouring rows, which are equal for equal proteins, ``[n]``."""
    block = slice(rows[0], rows[-1] + 1)
    lengths = np.asarray(proteins.lengths[block], dtype=np.int64)
    starts = np.asarray(proteins.starts[block], dtype=np.int64)
    # [n, 8]; of a shorter protein the last residue is read again and again.
    steps = np.minimum(np.arange(_END), np.maximum(lengths - 1, 0)[:, None])
    last = len(proteins.tokens) - 1
    head = proteins.tokens[np.minimum(starts[:, None] + steps, last)]
    tail = proteins.tokens[np.minimum(np.maximum(starts + lengths - 1, 0)[:, None] - steps, last)]
    numbers = [np.ascontiguousarray(end).view(np.uint64)[:, 0] for end in (head, tail)]
    numbers.append(lengths.astype(np.uint64))
    key = np.zeros(len(rows), dtype=np.uint64)
    for factor, number in zip(_ODD, numbers, strict=True):
        key = (key ^ number) * factor
        key ^= key >> np.uint64(32)
    return key


def _digest(proteins: Sequences, row: int) -> bytes:
    return hashlib.blake2b(proteins.residues(row).tobytes(), digest_size=16).digest()
