"""Reads the prediction files of a suite: the labels of the test proteins, and what was predicted.

Legend: ``n`` proteins or residues, ``c`` classes, ``k`` flags.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Row = Mapping[str, str]
Error = tuple[str, str, str]
"""Holds a protein, what is known of it, and what was predicted."""

_ID, _LABEL, _PREDICTION, _PROBABILITY = "id", "label", "prediction", "p_"
_NOTHING = "-"


@dataclass(frozen=True)
class Numbers:
    """Holds the numbers of one target.

    Attributes:
        target: Name of the target.
        ids: Protein of each number, ``[n]``; repeated for its residues.
        labels: What was measured, ``[n]``.
        values: What was predicted, ``[n]``.
        low: Lower end of the interval that is to hold 95 %, ``[n]``; None where the file has none.
        high: Upper end.
    """

    target: str
    ids: list[str]
    labels: Array
    values: Array
    low: Array | None = None
    high: Array | None = None

    def worst(self, most: int) -> list[Error]:
        """Return the proteins with the largest errors; of residues the mean absolute error counts."""
        errors = np.abs(self.values - self.labels)
        if len(set(self.ids)) == len(self.ids):
            order = np.argsort(-errors, kind="stable")[:most].tolist()
            return [(self.ids[n], f"{self.labels[n]:.4g}", f"{self.values[n]:.4g}") for n in order]
        names, rows = np.unique(self.ids, return_inverse=True)
        counts = np.bincount(rows)
        means = np.bincount(rows, errors) / counts
        order = np.argsort(-means, kind="stable")[:most].tolist()
        return [(str(names[n]), f"{counts[n]:,} residues", f"{means[n]:.4g} off on average") for n in order]


@dataclass(frozen=True)
class Classes:
    """Holds classes of proteins or residues.

    Attributes:
        target: Name of the target.
        names: The classes.
        counts: How often each known class was predicted as each, ``[c, c]``.
        errors: Proteins that are wrong, the worst first.
        known: Number of the known class, ``[n]``; None where the file has no probabilities.
        scores: Probability of each class, ``[n, c]``.
    """

    target: str
    names: list[str]
    counts: Array
    errors: list[Error]
    known: Array | None = None
    scores: Array | None = None

    def worst(self, most: int) -> list[Error]:
        """Return some that are wrong."""
        return self.errors[:most]


@dataclass(frozen=True)
class Flags:
    """Holds the classes of proteins that may have several.

    Attributes:
        names: The classes.
        known: 1 where a protein has the class, 0 where not and NaN where that is not known, ``[n, k]``.
        scores: Probability of each, ``[n, k]``.
        ids: The proteins, ``[n]``.
    """

    names: list[str]
    known: Array
    scores: Array
    ids: list[str]

    def worst(self, most: int) -> list[Error]:
        """Return the proteins of which most classes are wrong."""
        wrong = ((self.scores >= 0.5) != self.known) & ~np.isnan(self.known)
        order = np.argsort(-wrong.sum(axis=1), kind="stable")[:most].tolist()
        return [
            (self.ids[n], self._shown(self.known[n] == 1), self._shown(self.scores[n] >= 0.5))
            for n in order
            if wrong[n].any()
        ]

    def _shown(self, there: Array) -> str:
        return ", ".join(name for name, is_there in zip(self.names, there, strict=True) if is_there) or "none"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV with a header, however long their cells are."""
    csv.field_size_limit(1 << 30)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def targets_of(rows: Sequence[Row], kind: str) -> list[Numbers | Classes | Flags]:
    """Return what a prediction file holds of each target; a target without any label is left out.

    Args:
        rows: Rows of the file.
        kind: The value of `task.kind`.
    """
    if not rows:
        return []
    if kind == "multilabel":
        return [_flags(rows)]
    several = [name for name in rows[0] if name.startswith(f"{_LABEL}/")]
    targets = [(label.removeprefix(f"{_LABEL}/"), label) for label in several] or [("", _LABEL)]
    found: list[Numbers | Classes | Flags] = []
    for target, label in targets:
        if kind == "regression":
            found.append(_numbers(rows, label, target))
        elif kind == "token_regression":
            found.append(_residue_numbers(rows, label, target))
        elif kind == "classification":
            found.append(_classes(rows))
        elif kind == "token_classification":
            found.append(_residue_classes(rows, label, target))
    return [each for each in found if len(each.names if isinstance(each, Classes) else each.ids)]


def _numbers(rows: Sequence[Row], label: str, target: str) -> Numbers:
    value = target or next(name for name in rows[0] if name not in (_ID, _LABEL))
    kept = [row for row in rows if row[label].strip()]
    columns = [_column(kept, name) for name in (label, value)]
    there: Array = np.isfinite(np.array(columns)).all(axis=0)
    ends = [_column(kept, name)[there] for name in (f"{value}_low", f"{value}_high") if name in rows[0]]
    low, high = ends if len(ends) == 2 else (None, None)
    ids = [row[_ID] for row, is_there in zip(kept, there.tolist(), strict=True) if is_there]
    return Numbers(target or value, ids, columns[0][there], columns[1][there], low, high)


def _column(rows: Sequence[Row], name: str) -> Array:
    return np.array([float(row[name]) for row in rows])


def _residue_numbers(rows: Sequence[Row], label: str, target: str) -> Numbers:
    ids: list[str] = []
    parts: list[Array] = []
    for row in rows:
        if not row[label].strip():
            continue
        pair = np.array(
            [[_float(word) for word in _listed(row[name])] for name in (label, target or _PREDICTION)]
        )
        pair = pair[:, np.isfinite(pair).all(axis=0)]
        ids += [row[_ID]] * pair.shape[1]
        parts.append(pair)
    labels, values = np.concatenate([np.zeros((2, 0)), *parts], axis=1)
    return Numbers(target, ids, labels, values)


def _classes(rows: Sequence[Row]) -> Classes:
    rows = [row for row in rows if row[_LABEL].strip()]
    pairs = Counter((row[_LABEL], row[_PREDICTION]) for row in rows)
    columns = [name for name in rows[0] if name.startswith(_PROBABILITY)] if rows else []
    listed = [name.removeprefix(_PROBABILITY) for name in columns]
    names = [*listed, *sorted({name for pair in pairs for name in pair} - set(listed))]
    numbers = {name: number for number, name in enumerate(names)}
    known = np.array([numbers[row[_LABEL]] for row in rows], dtype=np.int64)
    scores = np.zeros((len(rows), len(names)))
    if columns:
        scores[:, : len(columns)] = [[float(row[name]) for name in columns] for row in rows]
    of_known = scores[np.arange(len(rows)), known]
    order = np.argsort(of_known, kind="stable").tolist()
    errors = [
        (row[_ID], row[_LABEL], row[_PREDICTION])
        for row in (rows[n] for n in order)
        if row[_LABEL] != row[_PREDICTION]
    ]
    counts = _counts(pairs, names)
    if not columns:
        return Classes("", names, counts, errors)
    return Classes("", names, counts, errors, known, scores)


def _residue_classes(rows: Sequence[Row], label: str, target: str) -> Classes:
    pairs: Counter[tuple[str, str]] = Counter()
    errors: list[tuple[float, Error]] = []
    for row in rows:
        if not row[label].strip():
            continue
        both = zip(_words(row[label]), _words(row[target or _PREDICTION]), strict=True)
        # A residue that does not count has "-" in place of its label.
        each = [pair for pair in both if _NOTHING not in pair]
        pairs.update(each)
        wrong = sum(known != predicted for known, predicted in each)
        if wrong:
            errors.append((wrong / len(each), (row[_ID], f"{len(each):,} residues", f"{wrong:,} wrong")))
    names = sorted({name for pair in pairs for name in pair})
    ordered = [shown for _, shown in sorted(errors, key=lambda each: -each[0])]
    return Classes(target, names, _counts(pairs, names), ordered)


def _flags(rows: Sequence[Row]) -> Flags:
    columns = [name for name in rows[0] if name.startswith(_PROBABILITY)]
    names = [name.removeprefix(_PROBABILITY) for name in columns]
    scores = np.array([[float(row[name]) for name in columns] for row in rows])
    if _LABEL in rows[0]:
        sets = [{word.strip() for word in row[_LABEL].split(";")} for row in rows]
        known = np.array([[float(name in words) for name in names] for words in sets])
    else:
        known = np.array([[_float(row[f"{_LABEL}/{name}"]) for name in names] for row in rows])
    return Flags(names, known, scores, [row[_ID] for row in rows])


def _counts(pairs: Mapping[tuple[str, str], int], names: Sequence[str]) -> Array:
    return np.array([[pairs.get((known, shown), 0) for shown in names] for known in names], dtype=np.int64)


def _words(cell: str) -> list[str]:
    """Return the class of each residue: from a JSON list, words between blanks, or characters."""
    if cell.startswith("[") or " " in cell.strip():
        return _listed(cell)
    return list(cell.strip())


def _listed(cell: str) -> list[str]:
    """Return what a cell has for each residue, in a JSON list or between blanks."""
    if cell.startswith("["):
        return [_NOTHING if each is None else str(each) for each in json.loads(cell)]
    return cell.split()


def _float(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return np.nan
