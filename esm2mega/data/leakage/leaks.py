"""Finds related proteins in different splits: pairs of at least some sequence identity, counted and named.

A pair is related if identity and coverage reach their thresholds in one alignment: the share of equal
residues among its columns, and the share of either protein that it covers. Equal sequences are found without
an alignment. Each protein of the later split keeps at most `MOST_RELATIVES` of another split, so that memory
is bounded where all are variants of one protein; counts of pairs are then lower bounds, those of proteins are
not.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm2mega.data.leakage.kmers import MOST_RELATIVES, kmer_hits
from esm2mega.data.leakage.mmseqs import find_mmseqs, mmseqs_hits
from esm2mega.errors import UserError
from esm2mega.files import replacing

MMSEQS, KMERS = "mmseqs", "k-mers"

COVERAGE = 0.8
"""An alignment counts if it covers this share of both proteins, as in the clusters of UniRef."""

_MOST_NAMED = 1000


class Pair(NamedTuple):
    """Names two related proteins in different splits.

    Attributes:
        split: The earlier split.
        id: Id of its protein.
        other_split: The later split.
        other_id: Id of its protein.
        identity: Share of equal residues in their alignment, from 0 to 1.
    """

    split: str
    id: str
    other_split: str
    other_id: str
    identity: float


@dataclass(frozen=True)
class _Distinct:
    """Holds the distinct sequences of a split.

    Attributes:
        sequences: The sequences, without repeats, in upper case.
        ids: The ids of each.
    """

    sequences: list[str]
    ids: list[list[str]]

    @classmethod
    def of(cls, proteins: Sequence[tuple[str, str]]) -> _Distinct:
        found: dict[str, list[str]] = {}
        for name, sequence in proteins:
            found.setdefault(sequence.upper(), []).append(name)
        return cls(list(found), list(found.values()))

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many proteins have each sequence, ``[n]``."""
        return np.array([len(names) for names in self.ids], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class SplitLeaks:
    """Holds the related pairs of two splits.

    Attributes:
        names: The earlier and the later split.
        rows: Distinct sequences of the two, ``[h, 2]``, the worst pair first.
        identities: Identity of each pair, ``[h]``.
        is_capped: Whether a protein may have more relatives than were kept.
        pairs: Number of pairs of proteins.
        identical: Number of pairs with equal sequences among these.
        proteins: Number of proteins of the later split with a relative in the earlier one.
        total: Number of proteins of the later split.
    """

    names: tuple[str, str]
    rows: npt.NDArray[np.int64]
    identities: npt.NDArray[np.float64]
    is_capped: bool
    pairs: int
    identical: int
    proteins: int
    total: int


@dataclass(frozen=True, eq=False)
class Leaks:
    """Holds what was found.

    Attributes:
        method: ``mmseqs`` or ``k-mers``.
        threshold: The least identity of a related pair.
        splits: What was found for each two splits.
    """

    method: str
    threshold: float
    splits: list[SplitLeaks]
    _distinct: Mapping[str, _Distinct] = field(repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of related pairs of each two splits, such as ``train/test``."""
        return {"/".join(found.names): found.pairs for found in self.splits}

    @property
    def num_pairs(self) -> int:
        """Return the number of related pairs."""
        return sum(found.pairs for found in self.splits)

    @property
    def num_identical(self) -> int:
        """Return the number of pairs with equal sequences."""
        return sum(found.identical for found in self.splits)

    @property
    def is_capped(self) -> bool:
        """Tell whether there may be more pairs than were counted."""
        return any(found.is_capped for found in self.splits)

    @property
    def num_proteins(self) -> int:
        """Return the number of proteins of a later split with a relative in an earlier one."""
        held: dict[str, set[int]] = {}
        for found in self.splits:
            held.setdefault(found.names[1], set()).update(found.rows[:, 1].tolist())
        return sum(len(self._distinct[name].ids[row]) for name, rows in held.items() for row in rows)

    @property
    def pairs(self) -> list[Pair]:
        """Return the pairs of the highest identity, at most 1000, the worst first."""
        return [pair for pair, _ in zip(self.every_pair(), range(_MOST_NAMED), strict=False)]

    def every_pair(self) -> Iterator[Pair]:
        """Yield every pair that was counted, the worst first."""
        identities = np.concatenate([found.identities for found in self.splits])
        owners = np.repeat(np.arange(len(self.splits)), [len(found.rows) for found in self.splits])
        rows = np.concatenate([found.rows for found in self.splits])
        for place in np.argsort(-identities, kind="stable").tolist():
            split, other = self.splits[owners[place]].names
            row, other_row = rows[place].tolist()
            for other_id in self._distinct[other].ids[other_row]:
                for name in self._distinct[split].ids[row]:
                    yield Pair(split, name, other, other_id, float(identities[place]))

    def summary(self) -> dict[str, Any]:
        """Return the counts for a file of results."""
        return {
            "method": self.method,
            "threshold": self.threshold,
            "pairs": self.num_pairs,
            "proteins": self.num_proteins,
            "splits": self.counts,
        }

    def write(self, path: Path) -> None:
        """Write every pair to a CSV, the worst first, whole or not at all."""
        with replacing(path) as partial, partial.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["split", "id", "other_split", "other_id", "identity"])
            table.writerows((*pair[:4], f"{pair.identity:.3f}") for pair in self.every_pair())

    def lines(self, most: int, is_written: bool) -> Iterator[str]:
        """Describe what was found, and name the `most` worst pairs; `is_written` says that a file has all."""
        by = (
            f"MMseqs2 (coverage of both proteins at least {COVERAGE:g}, E-value at most 0.001)"
            if self.method == MMSEQS
            else f"a screen of shared k-mers (coverage at least {COVERAGE:g}), which misses remote "
            "relatives; install MMseqs2 (apt-get install mmseqs2) to find them too"
        )
        yield f"pairs of proteins in different splits, identity at least {self.threshold:g}, by {by}"
        for found in self.splits:
            split, other = found.names
            least = "at least " if found.is_capped else ""
            yield (
                f"  {split}/{other}: {least}{found.pairs:,} pairs, {found.proteins:,} of {found.total:,} "
                f"proteins of {other} have a relative in {split}"
            )
        yield f"  identical sequences: {self.num_identical:,} pairs"
        if self.is_capped:
            yield f"  of the relatives of one protein in another split {MOST_RELATIVES} are counted and named"
        named = self.pairs[:most]
        for pair in named:
            yield f"  {pair.split} {pair.id}  {pair.other_split} {pair.other_id}  {100 * pair.identity:.1f} %"
        if self.num_pairs > len(named):
            cure = "" if is_written else "; --out FILE.csv names them"
            yield f"  and {self.num_pairs - len(named):,} more pairs{cure}"


def check_threshold(threshold: float) -> None:
    """Raise UserError if `threshold` is no identity."""
    if not 0 < threshold <= 1:
        raise UserError(f"--min-identity {threshold:g}: an identity is above 0 and at most 1, such as 0.3")


def find_leaks(
    splits: Mapping[str, Sequence[tuple[str, str]]],
    threshold: float = 0.3,
    threads: int = 1,
    method: str | None = None,
) -> Leaks:
    """Find related proteins in different splits.

    Args:
        splits: Ids and sequences of the proteins by split, in the order train, valid, test.
        threshold: Least identity of a related pair, above 0 and at most 1.
        threads: Number of threads of MMseqs2; the screen has one.
        method: ``mmseqs`` or ``k-mers``; None for MMseqs2 where it is installed.

    Raises:
        UserError: The threshold is no share.
        MachineError: MMseqs2 failed.
    """
    check_threshold(threshold)
    program = find_mmseqs() if method != KMERS else None
    if method == MMSEQS and program is None:
        raise UserError("MMseqs2 is not installed: there is no program mmseqs; apt-get install mmseqs2")
    distinct = {name: _Distinct.of(proteins) for name, proteins in splits.items()}

    def search(names: tuple[str, str]) -> SplitLeaks:
        first, second = (distinct[name] for name in names)
        if program is None:
            found = kmer_hits(first.sequences, second.sequences, threshold, COVERAGE)
        else:
            found = mmseqs_hits(
                program, first.sequences, second.sequences, threshold, COVERAGE, MOST_RELATIVES, threads
            )
        return _joined(names, first, second, *found)

    found = [search(names) for names in combinations(distinct, 2)]
    return Leaks(KMERS if program is None else MMSEQS, threshold, found, distinct)


def _joined(
    names: tuple[str, str],
    first: _Distinct,
    second: _Distinct,
    hits: npt.NDArray[np.int64],
    identities: npt.NDArray[np.float64],
    is_capped: bool,
) -> SplitLeaks:
    """Join what a search found, ``[h, 2]`` and ``[h]``, with the equal sequences of two splits."""
    places = {sequence: row for row, sequence in enumerate(first.sequences)}
    equal = np.array(
        [(places[s], row) for row, s in enumerate(second.sequences) if s in places], dtype=np.int64
    ).reshape(-1, 2)
    # A sequence occurs once in `first`: the partner of an equal one is known.
    partners = np.full(len(second.sequences), -1)
    partners[equal[:, 1]] = equal[:, 0]
    kept = partners[hits[:, 1]] != hits[:, 0]
    hits, identities = hits[kept], identities[kept]
    rows = np.concatenate([equal, hits])
    identities = np.concatenate([np.ones(len(equal)), identities])
    order = np.argsort(-identities, kind="stable")
    counts, other_counts = first.counts, second.counts
    products = counts[rows[:, 0]] * other_counts[rows[:, 1]]
    return SplitLeaks(
        names,
        rows[order],
        identities[order],
        is_capped,
        int(products.sum()),
        int(products[: len(equal)].sum()),
        int(other_counts[np.unique(rows[:, 1])].sum()),
        int(other_counts.sum()),
    )
