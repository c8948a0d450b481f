"""Holds proteins out, drawn by a seed or named by the user, and keeps them out of the training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data import counter_rng
from esm2mega.data.store.splits import SPLITS
from esm2mega.data.uniref.id_index import IdIndex
from esm2mega.data.uniref.mapping import shown
from esm2mega.errors import UserError


@dataclass(frozen=True)
class SplitSizes:
    """Says how many UniRef50 representatives are drawn for validation and test, and with which seed."""

    valid: int = 0
    test: int = 0
    seed: int = 1234

    def draw(self, total: int) -> DrawnRecords:
        """Draw among `total` records; raise UserError when nothing would be left to train on."""
        held_out = self.valid + self.test
        if held_out >= total:
            raise UserError(
                f"--val-size={self.valid} and --test-size={self.test} leave nothing to train on: the "
                f"UniRef50 file has {total} sequences; hold out fewer than that"
            )
        places = np.arange(held_out)
        drawn = counter_rng.permute(places, total, self.seed, counter_rng.Purpose.SPLIT)
        splits = np.where(places < self.valid, SPLITS.index("valid"), SPLITS.index("test"))
        order = np.argsort(drawn)
        return DrawnRecords(drawn[order], splits[order])


@dataclass(frozen=True)
class DrawnRecords:
    """Says which records are held out.

    Attributes:
        records: positions of the held-out records in the file, ascending, int64 [m].
        splits: index into `SPLITS` of each, int64 [m].
    """

    records: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int64]

    def of(self, records: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the index into `SPLITS` of each of the records, [n]."""
        assigned = np.full(len(records), SPLITS.index("train"), dtype=np.int64)
        if len(self.records):
            places = np.minimum(np.searchsorted(self.records, records), len(self.records) - 1)
            drawn = self.records[places] == records
            assigned[drawn] = self.splits[places[drawn]]
        return assigned


@dataclass(frozen=True)
class IndexedIds:
    """Holds the ids of a source, which yields one item with a `line` for each of them, in their order."""

    source: Any
    ids: IdIndex

    def location(self, number: int) -> str:
        """Say where an id stands, for messages; the source is read once more."""
        line = next(item.line for count, item in enumerate(self.source) if count == number)
        return str(self.source.location(line))

    def refuse_repeats(self, rule: str = "every cluster has one representative") -> None:
        """Raise UserError with the rule at the first id that occurs twice."""
        if found := self.ids.repeats():
            raise UserError(
                f"{self.location(found[0])}: {shown(self.ids[found[0]])} occurs earlier, at "
                f"{self.location(found[1])}; {rule}"
            )

    def refuse_overlap(self, others: IdIndex, what: str) -> None:
        """Raise UserError at the first id that is among `others`; `what` says what these are."""
        for first, ids in self.ids.blocks():
            known = np.flatnonzero(others.find(ids) >= 0)
            if len(known):
                raise UserError(
                    f"{self.location(first + int(known[0]))}: {shown(ids[known[0]])} is held out but {what}; "
                    "training, validation and test must not share anything"
                )


def refuse_shared_files(training: Mapping[str, str | Path], held_out: Mapping[str, str | Path]) -> None:
    """Raise UserError when one file is given under two options.

    Args:
        training: files of the training data by option.
        held_out: files of validation and test by option.
    """
    options = {**training, **held_out}
    for position, (option, path) in enumerate(options.items()):
        for other in list(options)[:position]:
            if Path(path).exists() and Path(options[other]).exists() and Path(path).samefile(options[other]):
                reason = (
                    "what is trained on cannot be held out"
                    if option in held_out and other in training
                    else "each has a file of its own"
                )
                raise UserError(f"{path}: given both as {other} and as {option}; {reason}")
