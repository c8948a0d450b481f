"""Turns labelled rows into the numbers that each kind of task needs, and learns classes and scale.

The classes (unless `task.classes` declares them) and the scale of targets come from the training data alone
and go into every checkpoint (`TargetInfo`); validation and prediction use them too. Text stays text, such as
a class named ``007``.

Legend: ``n`` proteins, ``k`` outputs, ``m`` target columns, ``L`` residues of a protein.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import NUMERIC_KINDS, PAIR_KIND, classes_of_columns, masks_of
from esm2mega.data.labels.cells import (
    Cells,
    check_length,
    classes_of,
    mask_of,
    names_of,
    number_of,
    numbers_of,
    text_of,
)
from esm2mega.data.labels.contacts import pair_labels, read_coordinates
from esm2mega.data.labels.numbers import PLAIN
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import first_of, shortened
from esm2mega.pairs import pairs_of

_SHOWN = 12


class TargetReader(ABC):
    """Reads the labels of one task."""

    def __init__(self, task: TaskConfig, forms: Sequence[str] = (), numbers: str = PLAIN) -> None:
        """Make the reader.

        Args:
            task: The task.
            forms: How classes of residues are written in each target column.
            numbers: How numbers are written: `data.numbers`.
        """
        self.task = task
        self.forms = list(forms)
        self.numbers = numbers

    @abstractmethod
    def read(self, cells: Cells, location: str, num_residues: int) -> Any:
        """Read the label of one row, not yet numbered; raise `UserError` with the location if it is bad."""

    def learn(self, labels: Sequence[Any], loaded: TargetInfo | None = None) -> TargetInfo:
        """Learn what predictions mean from the labels of the training data.

        Args:
            labels: Labels as `read` returns them.
            loaded: Targets of a head that was trained before. Its names and scale stay; counts and baseline
                are those of `labels`.

        Raises:
            UserError: There is nothing to learn from, or the number of classes differs from the configured.
        """
        info = self._learn(labels, loaded)
        untrained = [] if info.kind in (*NUMERIC_KINDS, PAIR_KIND) else _without_labels(info.counts)
        if loaded is None:
            info = replace(info, untrained=untrained)
        else:
            untrained = [number for number in untrained if number in loaded.untrained]
            info = replace(loaded, counts=info.counts, baseline=info.baseline, untrained=untrained)
        info = replace(info, forms=self.forms)
        configured, found = self.task.num_classes, info.num_outputs
        if configured is not None and configured != found:
            location = "data.train" if loaded is None else "the loaded head"
            raise UserError(
                f"task.num_classes={configured}, but {location} has {found} classes "
                f"({first_of(info.names, _SHOWN)}); correct it, or set task.num_classes=null"
            )
        return info

    @abstractmethod
    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        """Learn what predictions mean, with the classes of `loaded` in their order."""

    @abstractmethod
    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        """Return the numbers of one label.

        Their shape is ``[k]`` or ``[]`` for a protein, ``[L, m]`` for its residues, and ``[L, 3]`` for
        contacts, whose coordinates are returned.
        """


class _Numbers(TargetReader):
    """Reads labels of regression: a number for each target column, some of which may be missing."""

    def read(self, cells: Cells, location: str, num_residues: int) -> npt.NDArray[np.float64]:
        columns = self.task.target_columns
        return np.array([number_of(cells[column], column, location, self.numbers) for column in columns])

    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        values = np.stack(labels)
        return _scale_of(self.task, values, self.task.target_columns)

    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


class _ResidueNumbers(TargetReader):
    """Reads labels of token regression: a number for each residue in each target column, ``nan`` for none."""

    def read(self, cells: Cells, location: str, num_residues: int) -> npt.NDArray[np.float64]:
        columns = [
            np.where(
                mask_of(cells, mask, location, num_residues),
                numbers_of(cells, column, location, num_residues, self.numbers),
                np.nan,
            )
            for column, mask in zip(self.task.target_columns, masks_of(self.task), strict=True)
        ]
        return np.stack(columns, axis=1)

    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        return _scale_of(self.task, np.concatenate(labels), self.task.target_columns)

    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


class _Class(TargetReader):
    """Reads labels of classification: one class name for each protein."""

    def read(self, cells: Cells, location: str, num_residues: int) -> str:
        (column,) = self.task.target_columns
        return text_of(cells, column, location)

    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        (column,) = self.task.target_columns
        return _vocabulary(self.task, labels, _known(self.task, loaded), column)

    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        (column,) = self.task.target_columns
        return np.array(_number_in(label, info.names, column, location), dtype=np.int64)


class _ResidueClasses(TargetReader):
    """Reads labels of token classification: a class for each residue in each target column.

    Each column has classes of its own.
    """

    def __init__(self, task: TaskConfig, forms: Sequence[str] = (), numbers: str = PLAIN) -> None:
        super().__init__(task, forms, numbers)
        self._declared = [names or [] for names in classes_of_columns(task)]

    def read(self, cells: Cells, location: str, num_residues: int) -> list[list[str | None]]:
        """Read the class names of each column, None for residues that its mask marks with 0."""
        found = []
        columns = zip(self.task.target_columns, masks_of(self.task), self.forms, self._declared, strict=True)
        for column, mask, form, declared in columns:
            names = classes_of(cells, column, location, num_residues, form, declared)
            counts = mask_of(cells, mask, location, num_residues).tolist()
            found.append([name if there else None for name, there in zip(names, counts, strict=True)])
        return found

    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        columns = self.task.target_columns
        parts = []
        for number, column in enumerate(columns):
            there = [name for label in labels for name in label[number] if name is not None]
            parts.append(_vocabulary(self.task, there, _known(self.task, loaded, number), column))
        if len(parts) == 1:
            return parts[0]
        return TargetInfo(
            _kind_of(self.task),
            [name for part in parts for name in part.names],
            [count for part in parts for count in part.counts],
            baseline=[share for part in parts for share in part.baseline],
            columns=list(columns),
            widths=[len(part.names) for part in parts],
        )

    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        encoded = []
        for column, target, names in zip(self.task.target_columns, info.targets, label, strict=True):
            numbers: dict[str | None, int] = {
                name: _number_in(name, target.names, column, location)
                for name in set(names)
                if name is not None
            }
            numbers[None] = IGNORED
            encoded.append(np.array([numbers[name] for name in names], dtype=np.int64))
        return np.stack(encoded, axis=1)


class _NamedLabels(TargetReader):
    """Reads labels of multilabel tasks: names, in one column. An empty cell means that none applies."""

    def read(self, cells: Cells, location: str, num_residues: int) -> list[str]:
        (column,) = self.task.target_columns
        return names_of(cells, column, location)

    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        there = [name for label in labels for name in set(label)]
        (column,) = self.task.target_columns
        return _vocabulary(self.task, there, _known(self.task, loaded), column, total=len(labels))

    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        encoded = np.zeros(len(info.names))
        (column,) = self.task.target_columns
        encoded[[_number_in(name, info.names, column, location) for name in label]] = 1.0
        return encoded


class _FlagColumns(TargetReader):
    """Reads labels of multilabel tasks: a column of 0 and 1, or truth values, where cells may be missing."""

    def read(self, cells: Cells, location: str, num_residues: int) -> npt.NDArray[np.float64]:
        columns = self.task.target_columns
        flags = np.array(
            [number_of(_flag(cells[column]), column, location, self.numbers) for column in columns]
        )
        for column, flag in zip(columns, flags.tolist(), strict=True):
            if flag not in (0.0, 1.0) and not math.isnan(flag):
                raise UserError(
                    f"{location}: {shortened(cells[column])} in column {column!r}; a label is 0 or 1"
                )
        return flags

    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        flags = np.stack(labels)
        counts = np.nansum(flags, axis=0).astype(int)
        there = np.maximum(np.count_nonzero(~np.isnan(flags), axis=0), 1)
        return TargetInfo(
            _kind_of(self.task),
            list(self.task.target_columns),
            counts.tolist(),
            baseline=(counts / there).tolist(),
        )

    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


class _Contacts(TargetReader):
    """Reads the coordinates of residues for contacts, NaN where they are missing or masked."""

    def read(self, cells: Cells, location: str, num_residues: int) -> npt.NDArray[np.float64]:
        (column,) = self.task.target_columns
        coordinates = read_coordinates(cells[column], column, location)
        check_length(coordinates, num_residues, column, location)
        (mask,) = masks_of(self.task)
        return np.where(mask_of(cells, mask, location, num_residues)[:, None], coordinates, np.nan)

    def _learn(self, labels: Sequence[Any], loaded: TargetInfo | None) -> TargetInfo:
        longest = max(len(coordinates) for coordinates in labels)
        counts = np.zeros((2, longest), dtype=np.int64)  # contacts and other pairs by j - i
        for coordinates in labels:
            first, second = pairs_of(len(coordinates))
            found = pair_labels(coordinates, IGNORED)
            for row, label in enumerate((1, 0)):
                counts[row] += np.bincount((second - first)[found == label], minlength=longest)
        contacts, others = counts.sum(axis=1).tolist()
        if not contacts + others:
            raise UserError(
                "data.train holds no pair of residues that counts; correct task.target_columns, or give "
                "longer proteins"
            )
        frequencies = counts[0] / np.maximum(counts.sum(axis=0), 1)
        return TargetInfo(_kind_of(self.task), ["contact"], [contacts], baseline=frequencies.tolist())

    def encode(self, label: Any, info: TargetInfo, location: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


def target_reader(task: TaskConfig, forms: Sequence[str] = (), numbers: str = PLAIN) -> TargetReader:
    """Return the reader of a task's labels; the arguments are those of `TargetReader`."""
    several = len(task.target_columns) > 1
    readers: dict[str, type[TargetReader]] = {
        "regression": _Numbers,
        "classification": _Class,
        "multilabel": _FlagColumns if several else _NamedLabels,
        "token_classification": _ResidueClasses,
        "token_regression": _ResidueNumbers,
        PAIR_KIND: _Contacts,
    }
    return readers[_kind_of(task)](task, forms, numbers)


def join_labels(encoded: Iterable[npt.NDArray[Any]], per_residue: bool) -> npt.NDArray[Any]:
    """Join the labels of proteins, ``[n, k]`` or ``[n]``, or of their residues, ``[sum L, m]``."""
    return np.concatenate(list(encoded)) if per_residue else np.stack(list(encoded))


def _kind_of(task: TaskConfig) -> str:
    assert task.kind is not None
    return task.kind


def _scale_of(task: TaskConfig, values: npt.NDArray[np.float64], names: Sequence[str]) -> TargetInfo:
    """Return targets with mean and standard deviation of each column of ``[n, k]``; 0 and 1 if not scaled."""
    counts = np.count_nonzero(~np.isnan(values), axis=0)
    for name, count in zip(names, counts.tolist(), strict=True):
        if not count:
            raise UserError(
                f"the column {name!r} of data.train holds no number that counts; correct "
                "task.target_columns, or the mask"
            )
    means = np.nanmean(values, axis=0)
    mean, std = np.zeros(len(names)), np.ones(len(names))
    if task.scale_targets:
        mean, std = means, np.nanstd(values, axis=0)
        # Labels that are all equal: rounding of their mean may leave a deviation of theirs that is not 0.
        std[(np.nanmin(values, axis=0) == np.nanmax(values, axis=0)) | (std == 0.0)] = 1.0
    return TargetInfo(
        _kind_of(task), list(names), counts.tolist(), mean.tolist(), std.tolist(), means.tolist()
    )


def _vocabulary(
    task: TaskConfig,
    labels: Sequence[str],
    names: Sequence[str] | None,
    column: str,
    total: int | None = None,
) -> TargetInfo:
    """Return targets with the classes in numeric order if all are whole numbers, else in that of text.

    Args:
        task: Section whose kind the targets have.
        labels: Class names of all labels, with repeats.
        names: The classes where they are known; `encode` refuses others.
        column: Column of the labels.
        total: How many proteins or residues could have each class; None for the number of labels.
    """
    count_of = Counter(labels)
    if not count_of:
        raise UserError(
            f"the column {column!r} of data.train holds no label that counts; correct "
            "task.target_columns, or the mask"
        )
    if names is None:
        numeric = all(name.isdecimal() for name in count_of)
        names = sorted(count_of, key=lambda name: (int(name), name) if numeric else (0, name))
    counts = [count_of[name] for name in names]
    total = total or len(labels)
    return TargetInfo(_kind_of(task), list(names), counts, baseline=[count / total for count in counts])


def _known(task: TaskConfig, loaded: TargetInfo | None, number: int = 0) -> list[str] | None:
    """Return the classes of a target of the loaded head, else the declared ones; None if labels decide."""
    return classes_of_columns(task)[number] if loaded is None else loaded.targets[number].names


def _flag(value: object) -> object:
    """Return the number of a truth value in text, as pandas writes a column of booleans, or another cell."""
    return {"true": 1, "false": 0}.get(value.strip().lower(), value) if isinstance(value, str) else value


def _without_labels(counts: Sequence[int]) -> list[int]:
    return [number for number, count in enumerate(counts) if not count]


def _number_in(name: str, names: Sequence[str], column: str, location: str) -> int:
    """Return the number of a class among the known ones."""
    try:
        return names.index(name)
    except ValueError:
        raise UserError(
            f"{location}: the class {name!r} in column {column!r} is none of those of the head: "
            f"{first_of(names, _SHOWN)}; correct the label, remove the row, or train a head that has it "
            "(task.classes declares classes)"
        ) from None
