"""Reads the prediction files of a suite: the labels of the test proteins, and what was predicted."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ID, _LABEL = "id", "label"


@dataclass(frozen=True)
class Numbers:
    """Holds the numbers of a regression with one target: ids, labels and predictions of the proteins."""

    ids: list[str]
    labels: list[float]
    values: list[float]

    def worst(self, most: int) -> list[tuple[str, str, str]]:
        """Return id, label and prediction of the proteins with the largest errors."""
        order = sorted(range(len(self.ids)), key=lambda row: -abs(self.values[row] - self.labels[row]))
        return [(self.ids[r], f"{self.labels[r]:.4g}", f"{self.values[r]:.4g}") for r in order[:most]]


@dataclass(frozen=True)
class Classes:
    """Holds how often each known class was predicted as each, of proteins or of residues.

    Attributes:
        names: The classes.
        counts: Rows of the known class, columns of the predicted one.
        errors: Id, known and predicted class of proteins, or wrong residues and all; the worst first.
    """

    names: list[str]
    counts: list[list[int]]
    errors: list[tuple[str, str, str]]

    def worst(self, most: int) -> list[tuple[str, str, str]]:
        """Return id, label and prediction of some that are wrong."""
        return self.errors[:most]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV with a header, however long their cells are."""
    csv.field_size_limit(1 << 30)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers_of(rows: Sequence[dict[str, str]]) -> Numbers | None:
    """Return the numbers of a file with one target; None where there are several."""
    names = [name for name in rows[0] if name not in (_ID, _LABEL)] if rows else []
    if _LABEL not in (rows[0] if rows else {}) or not names:
        return None
    kept = [row for row in rows if row[_LABEL].strip()]
    found = [(row[_ID], float(row[_LABEL]), float(row[names[0]])) for row in kept]
    found = [each for each in found if all(math.isfinite(value) for value in each[1:])]
    return Numbers(*(list(column) for column in zip(*found, strict=True))) if found else None


def classes_of(rows: Sequence[dict[str, str]], per_residue: bool) -> Classes | None:
    """Return how known and predicted classes of one target go together; None where there are several."""
    if not rows or _LABEL not in rows[0] or "prediction" not in rows[0]:
        return None
    pairs: Counter[tuple[str, str]] = Counter()
    errors: list[tuple[float, tuple[str, str, str]]] = []
    for row in rows:
        known, predicted = row[_LABEL], row["prediction"]
        if not per_residue:
            pairs[known, predicted] += 1
            if known != predicted:
                errors.append((1.0, (row[_ID], known, predicted)))
            continue
        # A residue that does not count has "-" in place of its label.
        each = [pair for pair in zip(known, predicted, strict=False) if "-" not in pair]
        pairs.update(each)
        wrong = sum(a != b for a, b in each)
        if each:
            errors.append((wrong / len(each), (row[_ID], f"{len(each):,} residues", f"{wrong:,} wrong")))
    names = sorted({name for pair in pairs for name in pair})
    counts = [[pairs[known, predicted] for predicted in names] for known in names]
    ordered = [shown for _, shown in sorted(errors, key=lambda each: -each[0])]
    return Classes(names, counts, ordered)
