"""Groups proteins so that no two groups have relatives, by MMseqs2 or the built-in screen of shared k-mers.

Relatives of relatives belong together too: a group is a connected component of the pairs that a search finds.
A search names at most `MOST_RELATIVES` of a protein, so groups are searched again after they were divided,
until no pair of relatives is found across the borders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from esm2mega.data.leakage.kmers import MOST_RELATIVES, kmer_hits
from esm2mega.data.leakage.leaks import COVERAGE, KMERS, MMSEQS
from esm2mega.data.leakage.mmseqs import find_mmseqs, mmseqs_hits

Rows = npt.NDArray[np.int64]
Divide = Callable[[Rows], Rows]
"""Takes the group of each protein, ``[n]``, and returns its part, the same for all of a group, ``[n]``."""


def divide_apart(
    sequences: Sequence[str], identity: float, divide: Divide, method: str | None = None
) -> tuple[Rows, Rows, str]:
    """Divide proteins into parts of which no two have relatives.

    Args:
        sequences: Distinct sequences, in upper case.
        identity: Least identity of relatives, above 0 and at most 1.
        divide: Divides groups; called until no relatives are found in different parts.
        method: ``mmseqs`` or ``k-mers``; None for MMseqs2 where it is installed.

    Returns:
        Part and group of each sequence, ``[n]`` each, and the method.

    Raises:
        MachineError: MMseqs2 failed.
    """
    program = find_mmseqs() if method != KMERS else None

    def pairs(first: Rows, second: Rows) -> Rows:
        """Return the related pairs between two sets of rows, ``[h, 2]``."""
        a, b = ([sequences[row] for row in rows.tolist()] for rows in (first, second))
        if program is None:
            hits, _, _ = kmer_hits(a, b, identity, COVERAGE)
        else:
            hits, _, _ = mmseqs_hits(program, a, b, identity, COVERAGE, MOST_RELATIVES, threads=1)
        return np.stack([first[hits[:, 0]], second[hits[:, 1]]], axis=1)

    every = np.arange(len(sequences))
    groups = _Groups(len(sequences))
    groups.join(pairs(every, every))
    while True:
        parts = divide(groups.numbers)
        across = [
            pairs(np.flatnonzero(parts == a), np.flatnonzero(parts == b))
            for a, b in combinations(np.unique(parts).tolist(), 2)
        ]
        found = np.concatenate([*across, np.zeros((0, 2), dtype=np.int64)])
        if not len(found):
            return parts, groups.numbers, KMERS if program is None else MMSEQS
        groups.join(found)


class _Groups:
    """Joins rows to groups, whose number is their first row."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    @property
    def numbers(self) -> Rows:
        """Return the group of each row, ``[n]``."""
        return np.array([self._root(row) for row in range(len(self._parents))], dtype=np.int64)

    def join(self, pairs: Rows) -> None:
        """Join the groups of each pair of rows, ``[h, 2]``."""
        for row, other in pairs.tolist():
            first, second = sorted((self._root(row), self._root(other)))
            self._parents[second] = first

    def _root(self, row: int) -> int:
        parents = self._parents
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row
