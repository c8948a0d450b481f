"""Decides to which split each record of the inputs goes: drawn, by position, or from files for each split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega.config.split import SPLITS
from esm2mega.data import counter_rng
from esm2mega.data.overlap import KnownSequences
from esm2mega.data.store.parts import Part
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.files import shortened

TRAIN = SPLITS.index("train")
LEFT_OUT = -1
"""Stands in the place of a split for records that go to none."""


class Splits(ABC):
    """Says which records go to which split, for inputs that have become parts.

    Attributes:
        cause: Why splits may share proteins, for messages.
        cure: How to prepare splits that do not.
    """

    cause: str
    cure: str

    @abstractmethod
    def names(self) -> list[str]:
        """Return the splits that get a record, and always `train`."""

    @abstractmethod
    def of_source(self, source: int) -> str:
        """Return the split whose input a source is, though records of it may be drawn for other splits."""

    def is_from(self, split: str, source: int) -> bool:
        """Tell whether records of a source may be in a split."""
        return self.of_source(source) == split

    @abstractmethod
    def assign(self, part: Part, store: TokenStore, rows: range, position: int) -> npt.NDArray[np.int64]:
        """Return the index into `SPLITS`, or `LEFT_OUT`, of some records of a part, [len(rows)].

        Args:
            part: the part.
            store: its store.
            rows: rows of the records in the store.
            position: position of the first of them over all inputs.
        """

    @abstractmethod
    def provenance(self) -> Mapping[str, object]:
        """Return the manifest's entry about the split, once all records are assigned."""

    def check(self, num_training: int) -> None:  # noqa: B027
        """Raise UserError if the assigned records leave nothing to train on."""

    def notes(self, out: Path) -> list[str]:
        """Return what the user should know about it, once all records are assigned."""
        return []


class SplitsOfOneInput(Splits):
    """Gives each record of the input to a split by its position, whatever it holds.

    Attributes:
        records: positions of the held-out records, ascending, int64 [m].
        splits: index into `SPLITS` of each, int64 [m].
    """

    cause = "the input repeats them"
    cure = "from an input without repeats"

    def __init__(
        self, records: npt.NDArray[np.int64], splits: npt.NDArray[np.int64], provenance: Mapping[str, object]
    ) -> None:
        self.records, self.splits, self._provenance = records, splits, provenance

    def names(self) -> list[str]:
        return [split for index, split in enumerate(SPLITS) if index == TRAIN or index in self.splits]

    def of_source(self, source: int) -> str:
        return "train"

    def is_from(self, split: str, source: int) -> bool:
        return True

    def assign(self, part: Part, store: TokenStore, rows: range, position: int) -> npt.NDArray[np.int64]:
        assigned = np.full(len(rows), TRAIN, dtype=np.int64)
        begin, end = np.searchsorted(self.records, (position, position + len(rows)))
        assigned[self.records[begin:end] - position] = self.splits[begin:end]
        return assigned

    def provenance(self) -> Mapping[str, object]:
        return self._provenance if len(self.records) else {}


class DrawnSplits(SplitsOfOneInput):
    """Draws the held-out records: the first of a random order are for validation, the next for test."""

    def __init__(self, total: int, valid_size: int, test_size: int, seed: int) -> None:
        """Draw among `total` records; raise UserError when nothing would be left to train on."""
        held_out = valid_size + test_size
        if held_out and held_out >= total:
            raise UserError(
                f"--val-size={valid_size} and --test-size={test_size} leave nothing to train on: "
                f"the input has {total} sequences; hold out fewer than that"
            )
        drawn = counter_rng.permute(np.arange(held_out), max(total, 1), seed, counter_rng.Purpose.SPLIT)
        order = np.argsort(drawn)
        splits = np.where(np.arange(held_out) < valid_size, SPLITS.index("valid"), SPLITS.index("test"))
        provenance = {"seed": seed, "valid_size": valid_size, "test_size": test_size, "total": total}
        super().__init__(drawn[order], splits[order], provenance)


class PositionalSplits(SplitsOfOneInput):
    """Takes splits that lie one behind the other, with the rounding of Megatron-LM's ``--split``."""

    def __init__(self, total: int, shares: Sequence[int]) -> None:
        """Share `total` records out among `SPLITS`; raise UserError when nothing is left to train on."""
        borders = [0]
        for share in shares:
            borders.append(borders[-1] + round(Fraction(share * total, sum(shares))))
        # Rounding may leave or take too much, which the first split makes up for.
        excess = borders[-1] - total
        first, second, _ = (max(0, border - excess) for border in borders[1:])
        if not first:
            raise UserError(
                f"--split {','.join(map(str, shares))} leaves nothing to train on: the input has {total} "
                "sequences; give the first a larger share"
            )
        records = np.arange(first, total, dtype=np.int64)
        splits = np.where(records < second, SPLITS.index("valid"), SPLITS.index("test"))
        super().__init__(records, splits, {"positions": [first, second, total], "total": total})


def shares_of(text: str) -> list[int]:
    """Read ``--split``, a number for each of `SPLITS`.

    Raises:
        UserError: It is something else, or the first number is 0.
    """
    words = [word.strip() for word in text.split(",")]
    are_numbers = all(word.isascii() and word.isdecimal() and len(word) < 16 for word in words)
    if len(words) != len(SPLITS) or not are_numbers or not int(words[TRAIN]):
        raise UserError(
            f"--split {shortened(text)}: give three whole numbers, for train, valid and test, the first "
            "above 0, such as 900,50,50"
        )
    return [int(word) for word in words]


class GivenSplits(Splits):
    """Takes validation and test from sources of their own, and leaves their proteins out of training."""

    cause = "both of their files hold them"
    cure = "from files that share none"

    def __init__(self, num_training: int, given: Mapping[str, str], parts: Sequence[Part]) -> None:
        """Index the held-out proteins.

        Args:
            num_training: number of the sources of training; those of the other splits follow them.
            given: names of the files of the other splits, in the order of their sources.
            parts: parts of all sources.

        Raises:
            UserError: No sequence was taken from one of these files.
        """
        for number, (split, file) in enumerate(given.items(), num_training):
            if not any(part.sequences for part in parts if part.source == number):
                raise UserError(f"--{split}: no sequence is left of {file}; name a file with some")
        self._splits = ["train"] * num_training + list(given)
        self._given = dict(given)
        held_out = [part for part in parts if part.path is not None and part.source >= num_training]
        self._known = KnownSequences(part.open()[0] for part in held_out)
        self._num_left_out = 0
        self._first = ""

    def names(self) -> list[str]:
        return [split for split in SPLITS if split in self._splits]

    def of_source(self, source: int) -> str:
        return self._splits[source]

    def assign(self, part: Part, store: TokenStore, rows: range, position: int) -> npt.NDArray[np.int64]:
        split = SPLITS.index(self._splits[part.source])
        assigned = np.full(len(rows), split, dtype=np.int64)
        if split == TRAIN:
            known = self._known.contains(store, rows)
            assigned[known] = LEFT_OUT
            if known.any() and not self._num_left_out:
                self._first = store.id(rows[int(np.argmax(known))])
            self._num_left_out += int(known.sum())
        return assigned

    def provenance(self) -> Mapping[str, object]:
        return {"given": self._given, "left_out": self._num_left_out}

    def check(self, num_training: int) -> None:
        if self._num_left_out and not num_training:
            raise UserError(
                f"nothing is left to train on: all sequences of the input are also in {self._options}; "
                "name another file there"
            )

    def notes(self, out: Path) -> list[str]:
        if not self._num_left_out:
            return []
        return [
            f"{out / 'train'}: without {self._num_left_out:,} sequences of the input that are also in "
            f"{self._options}; the first is {self._first!r}"
        ]

    @property
    def _options(self) -> str:
        return " or ".join(f"--{split}" for split in self._given)
