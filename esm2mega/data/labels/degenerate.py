"""Finds labels that teach nothing or measure nothing, and says so with the row of the first, before training.

Each finding is a note for the user; only a head of a single class, which can learn nothing, is refused.

Legend: ``n`` proteins, ``k`` outputs, ``m`` target columns, ``L`` residues of a protein.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.contacts import SEPARATION, pair_labels
from esm2mega.data.labels.schema import IGNORED, Target, TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import first_of

Array = npt.NDArray[Any]

_NEARLY_EQUAL = 1e-3
"""Is the standard deviation of all numbers but one, relative to that of all, which is worth a note."""


_MANY_NUMBERS = 100
"""Is the number of classes named by whole numbers from which on they are taken for measurements."""
_MANY_FRACTIONS = 20
"""Is that number where some of them are no whole numbers."""


@dataclass(frozen=True)
class SplitLabels:
    """Holds the labels of a split, and where they stand.

    Attributes:
        key: Name of the split for the user, such as ``data.train``.
        labels: Labels as in `esm2mega.data.labels.dataset.LabelledProteins`.
        offsets: Where the residues of each protein begin, and the end, ``[n + 1]``.
        locations: Location of each protein, ``[n]``.
        trains: Whether a model is trained on them.
    """

    key: str
    labels: Array
    offsets: npt.NDArray[np.int64]
    locations: Sequence[str]
    trains: bool


def label_notes(split: SplitLabels, info: TargetInfo, columns: Sequence[str]) -> list[str]:
    """Describe labels that teach nothing, in training, or measure nothing, in a held-out split.

    Args:
        split: The labels.
        info: Their meaning.
        columns: The target columns, for messages.
    """
    if info.per_pair:
        return _of_contacts(split)

    def place(index: int) -> str:
        if info.per_residue:
            index = int(np.searchsorted(split.offsets, index, side="right")) - 1
        return split.locations[index]

    if info.kind == "multilabel":
        return _of_flags(split, info, place)
    describe = _of_numbers if info.kind in NUMERIC_KINDS else _of_classes
    by_target = split.labels.T if split.labels.ndim == 2 else split.labels[None]
    return [
        note
        for target, column, labels in zip(info.targets, columns, by_target, strict=True)
        for note in describe(split, target, f"in column {column!r}", labels, place)
    ]


def check_classes(info: TargetInfo, columns: Sequence[str], notes: Sequence[str]) -> None:
    """Refuse a head of which a target has a single class: its loss is 0, whatever the weights are.

    Args:
        info: Meaning of the head's outputs.
        columns: The target columns.
        notes: Notes on the training labels, from `label_notes`.
    """
    if info.kind not in ("classification", "token_classification"):
        return
    for target, column in zip(info.targets, columns, strict=True):
        if len(target.names) == 1:
            where = f"in column {column!r}"
            reason = next((note for note in notes if where in note), f"{where} there is one class")
            raise UserError(
                f"{reason}: a head needs two classes; give labels of another one too, or name both in "
                "task.classes"
            )


def question_classes(info: TargetInfo, task: TaskConfig) -> None:
    """Refuse numbers that nobody has declared to be classes and that look like measurements.

    Args:
        info: Meaning of the head's outputs.
        task: Section of the configuration, which may declare classes or their number.

    Raises:
        UserError: There are too many different numbers, or many that are no whole numbers.
    """
    if info.kind not in ("classification", "token_classification") or task.classes or task.num_classes:
        return
    for target, column in zip(info.targets, task.target_columns, strict=True):
        names = target.names
        if len(names) < _MANY_FRACTIONS or not all(map(_is_number, names)):
            continue
        fractions = [name for name in names if not float(name).is_integer()]
        if len(names) < _MANY_NUMBERS and not fractions:
            continue
        kind = "regression" if info.kind == "classification" else "token_regression"
        raise UserError(
            f"task.kind={info.kind}: the column {column!r} holds {len(names)} different numbers, such as "
            f"{(fractions or names)[0]}, and each would be a class; if they are measurements, set "
            f"task.kind={kind}, and if they are classes, declare them by task.num_classes={len(names)} or "
            "task.classes"
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _of_numbers(
    split: SplitLabels, target: Target, where: str, labels: Array, place: Callable[[int], str]
) -> list[str]:
    there = np.flatnonzero(~np.isnan(labels))
    values = labels[there]
    if not len(values):
        return []  # the first lines of a run say that all labels are missing
    if values.min() == values.max():
        so = "there is nothing to learn" if split.trains else "correlations are not defined"
        return [
            f"{_all(len(values), 'number')} of {split.key} {where} is {values[0]!s}, "
            f"first at {place(int(there[0]))}, so {so}"
        ]
    farthest = int(np.abs(values - np.median(values)).argmax())
    if 0.0 < np.delete(values, farthest).std() < _NEARLY_EQUAL * values.std():
        return [
            f"{place(int(there[farthest]))}: {values[farthest]!s} {where} is an extreme outlier, next to "
            f"which all other numbers of {split.key} look the same; check that label"
        ]
    return []


def _of_classes(
    split: SplitLabels, target: Target, where: str, labels: Array, place: Callable[[int], str]
) -> list[str]:
    there = np.flatnonzero(labels != IGNORED)
    if not len(there):
        return []
    notes = []
    if (labels[there] == labels[there[0]]).all():
        note = (
            f"{_all(len(there), 'label')} of {split.key} {where} is of the class "
            f"{target.names[labels[there[0]]]!r}, first at {place(int(there[0]))}"
        )
        so = "there is nothing to learn" if split.trains else "auroc is not defined, and accuracy says little"
        notes.append(f"{note}, so {so}")
    found = {number: np.flatnonzero(labels == number) for number in target.untrained}
    return notes + _of_untrained(split, target, where, found, place)


def _of_flags(split: SplitLabels, info: TargetInfo, place: Callable[[int], str]) -> list[str]:
    (target,), labels = info.targets, split.labels
    constant = []
    for number, name in enumerate(info.names):
        flags = labels[~np.isnan(labels[:, number]), number]
        if len(flags) and flags.min() == flags.max() and number not in info.untrained:
            constant.append(f"{name} ({int(flags[0])})")
    notes = []
    if constant:
        so = "nothing is learned of them" if split.trains else "their auroc is not defined"
        notes.append(
            f"{len(constant)} of {len(info.names)} labels are the same for every protein of {split.key}, "
            f"from {split.locations[0]} on, so {so}: {first_of(constant)}"
        )
    found = {number: np.flatnonzero(labels[:, number] == 1.0) for number in info.untrained}
    return notes + _of_untrained(split, target, "", found, place)


def _of_untrained(
    split: SplitLabels, target: Target, where: str, found: dict[int, Array], place: Callable[[int], str]
) -> list[str]:
    """Describe the labels of classes that no training has had a label of, given their places by class."""
    where = f" {where}" if where else ""
    if split.trains:
        names = [target.names[number] for number in found]
        return [f"{split.key} has no label of the class {name!r}{where}" for name in names]
    notes = []
    for number, places in found.items():
        if len(places):
            count, name = len(places), target.names[number]
            are, they = ("label is", "it counts") if count == 1 else ("labels are", "they count")
            first = place(int(places[0]))
            notes.append(
                f"{count} {are} of the class {name!r} in {split.key}{where}, first at {first}; training had "
                f"none of that class, so {they} as wrong"
            )
    return notes


def _of_contacts(split: SplitLabels) -> list[str]:
    """Look for a contact and for another pair, protein by protein until both are found."""
    seen: set[int] = set()
    for first, end in pairwise(split.offsets.tolist()):
        seen |= set(np.unique(pair_labels(split.labels[first:end], IGNORED)).tolist()) - {IGNORED}
        if len(seen) > 1:
            return []
    if not seen:
        return []
    which = "no pair" if seen == {0} else "every pair"
    so = "there is nothing to learn" if split.trains else "the precision of contacts says nothing"
    return [
        f"{which} of residues of {split.key} is in contact, from {split.locations[0]} on (of those that are "
        f"{SEPARATION} or more apart along the chain), so {so}; are the coordinates in Angstrom?"
    ]


def _all(count: int, what: str) -> str:
    return f"the only {what}" if count == 1 else f"each of the {count} {what}s"
