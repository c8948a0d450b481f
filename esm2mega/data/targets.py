"""Cells of a labelled table to numbers: what each kind of task reads, and the label vocabulary.

A vocabulary and the scale of targets come from the training data alone and go into every checkpoint
(`TargetInfo`); validation and prediction use these. Text stays text: a class named ``NA`` or ``007`` is that
class.

Legend: ``n`` proteins, ``k`` targets or classes, ``L`` residues of a protein.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import PAIR_KIND, RESIDUE_KINDS
from esm2mega.data.contacts import pair_labels, pairs_of, read_coordinates
from esm2mega.data.records import MISSING_VALUES
from esm2mega.errors import UserError

IGNORED = -100
"""Label of a residue or protein that does not count, as in PyTorch's cross-entropy. For numbers it is NaN."""

_SHOWN = 12


@dataclass(frozen=True)
class TargetInfo:
    """What predictions mean; made from the training labels and kept with the weights.

    Attributes:
        kind: `task.kind`.
        names: Of the outputs: target columns of numbers, classes of all others.
        counts: Training labels of each class (of multilabel: proteins that have it); of numbers, how many.
        mean: Subtracted from each numeric target for training; empty for classes.
        std: Divides it.
        baseline: What one predicts who knows the training labels alone: their mean, or the frequency of each
            class; of each output. Of contacts their frequency at each distance along the chain, from 0. Empty
            in checkpoints of earlier versions.
    """

    kind: str
    names: list[str]
    counts: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list, compare=False)

    @property
    def per_residue(self) -> bool:
        """Whether labels are stored by residue; those of pairs follow from them."""
        return self.kind in RESIDUE_KINDS or self.per_pair

    @property
    def per_pair(self) -> bool:
        return self.kind == PAIR_KIND

    @property
    def num_outputs(self) -> int:
        """Width of the head."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> TargetInfo:
        """Inverse of `to_dict`."""
        return TargetInfo(**state)


Cells = Mapping[str, object]


class TargetReader(ABC):
    """Reads the labels of one task."""

    def __init__(self, task: TaskConfig) -> None:
        self.task = task

    @abstractmethod
    def read(self, cells: Cells, place: str, num_residues: int) -> Any:
        """The label of one row, not yet numbered; raises `UserError` with the place."""

    def learn(self, labels: Sequence[Any], loaded: TargetInfo | None = None) -> TargetInfo:
        """What predictions mean, from the labels of the training data.

        Args:
            labels: As `read` gives them.
            loaded: Of a head that was trained before. Its names and scale stay; counts and baseline are those
                of `labels`.

        Raises:
            UserError: Nothing to learn from, or another number of classes than configured.
        """
        info = self._learn(labels, None if loaded is None else loaded.names)
        if loaded is not None:
            info = replace(loaded, counts=info.counts, baseline=info.baseline)
        wanted, found = self.task.num_classes, info.num_outputs
        if wanted is not None and wanted != found:
            place = "data.train" if loaded is None else "the loaded head"
            raise UserError(
                f"task.num_classes={wanted}, but {place} has {found} classes ({_shown(info.names)}); "
                "correct it, or set task.num_classes=null"
            )
        return info

    @abstractmethod
    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
        """The same. Args: names: classes in their order, where they are known already."""

    @abstractmethod
    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        """Numbers of one label: ``[k]`` or ``[]`` of a protein, ``[L]`` of its residues."""

    def _cell(self, cells: Cells, column: str, place: str) -> str:
        """A cell as text."""
        value = cells[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{place}: the label in column {column!r} is empty; complete or remove the row")
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise UserError(f"{place}: the label {value!r} in column {column!r} is no text; write it as text")
        return str(value).strip()

    def _mask(self, cells: Cells, place: str, num_residues: int) -> npt.NDArray[np.bool_]:
        """Which residues count, ``[L]``."""
        column = self.task.mask_column
        if column is None:
            return np.ones(num_residues, dtype=bool)
        text = self._cell(cells, column, place)
        _check_length(text, num_residues, column, place)
        if stray := set(text) - {"0", "1"}:
            raise UserError(f"{place}: {min(stray)!r} in column {column!r}; a mask is made of 0 and 1")
        return np.frombuffer(text.encode(), dtype=np.uint8) == ord("1")


class _Numbers(TargetReader):
    """Regression: one number for each target column, some of which may be missing."""

    def read(self, cells: Cells, place: str, num_residues: int) -> npt.NDArray[np.float64]:
        columns = self.task.target_columns
        return np.array([_number(cells[column], column, place) for column in columns])

    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
        values = np.stack(labels)
        return _scale_of(self.task, values, self.task.target_columns)

    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


class _ResidueNumbers(TargetReader):
    """Token regression: a number for each residue, ``nan`` for none."""

    def read(self, cells: Cells, place: str, num_residues: int) -> npt.NDArray[np.float64]:
        (column,) = self.task.target_columns
        value = cells[column]
        words = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(words, list):
            raise UserError(f"{place}: the labels in column {column!r} are {value!r}, not a list of numbers")
        _check_length(words, num_residues, column, place)
        numbers = np.array([_number(word, column, place) for word in words], dtype=np.float64)
        return np.where(self._mask(cells, place, num_residues), numbers, np.nan)

    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
        return _scale_of(self.task, np.concatenate(labels)[:, None], self.task.target_columns)

    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


class _Class(TargetReader):
    """Classification: one class name for a protein."""

    def read(self, cells: Cells, place: str, num_residues: int) -> str:
        (column,) = self.task.target_columns
        return self._cell(cells, column, place)

    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
        return _vocabulary(self.task, labels, names)

    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        return np.array(_number_of(label, info, place), dtype=np.int64)


class _ResidueClasses(TargetReader):
    """Token classification: a character for each residue, or a word for each with blanks between."""

    def read(self, cells: Cells, place: str, num_residues: int) -> list[str | None]:
        (column,) = self.task.target_columns
        text: Sequence[str] = self._cell(cells, column, place)
        if len(text) != num_residues and len(words := str(text).split()) == num_residues:
            text = words
        _check_length(text, num_residues, column, place)
        mask = self._mask(cells, place, num_residues)
        return [name if counts else None for name, counts in zip(text, mask.tolist(), strict=True)]

    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
        there = [name for label in labels for name in label if name is not None]
        return _vocabulary(self.task, there, names)

    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        numbers: dict[str | None, int] = {
            name: _number_of(name, info, place) for name in set(label) if name is not None
        }
        numbers[None] = IGNORED
        return np.array([numbers[name] for name in label], dtype=np.int64)


class _NamedLabels(TargetReader):
    """Multilabel: names with ``;`` between; an empty cell is no label at all, which is a label too."""

    def read(self, cells: Cells, place: str, num_residues: int) -> list[str]:
        (column,) = self.task.target_columns
        value = cells[column]
        if value is None:
            return []
        if not isinstance(value, str):
            raise UserError(f"{place}: the labels {value!r} in column {column!r} are no text")
        return [name.strip() for name in value.split(";") if name.strip()]

    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
        there = [name for label in labels for name in set(label)]
        return _vocabulary(self.task, there, names, len(labels))

    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        encoded = np.zeros(len(info.names))
        encoded[[_number_of(name, info, place) for name in label]] = 1.0
        return encoded


class _FlagColumns(TargetReader):
    """Multilabel: a column of 0 and 1 for each label, some of which may be missing."""

    def read(self, cells: Cells, place: str, num_residues: int) -> npt.NDArray[np.float64]:
        columns = self.task.target_columns
        flags = np.array([_number(cells[column], column, place) for column in columns])
        for column, flag in zip(columns, flags.tolist(), strict=True):
            if flag not in (0.0, 1.0) and not math.isnan(flag):
                raise UserError(f"{place}: {cells[column]!r} in column {column!r}; a label is 0 or 1")
        return flags

    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
        flags = np.stack(labels)
        counts = np.nansum(flags, axis=0).astype(int)
        there = np.maximum(np.count_nonzero(~np.isnan(flags), axis=0), 1)
        return TargetInfo(
            _kind_of(self.task),
            list(self.task.target_columns),
            counts.tolist(),
            baseline=(counts / there).tolist(),
        )

    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


class _Contacts(TargetReader):
    """Contacts: coordinates of each residue, NaN where there are none or where the mask hides them."""

    def read(self, cells: Cells, place: str, num_residues: int) -> npt.NDArray[np.float64]:
        (column,) = self.task.target_columns
        coordinates = read_coordinates(cells[column], column, place)
        _check_length(coordinates, num_residues, column, place)
        return np.where(self._mask(cells, place, num_residues)[:, None], coordinates, np.nan)

    def _learn(self, labels: Sequence[Any], names: Sequence[str] | None) -> TargetInfo:
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

    def encode(self, label: Any, info: TargetInfo, place: str) -> npt.NDArray[Any]:
        return np.asarray(label, dtype=np.float64)


def target_reader(task: TaskConfig) -> TargetReader:
    """The reader of a task's labels."""
    several = len(task.target_columns) > 1
    readers: dict[str, type[TargetReader]] = {
        "regression": _Numbers,
        "classification": _Class,
        "multilabel": _FlagColumns if several else _NamedLabels,
        "token_classification": _ResidueClasses,
        "token_regression": _ResidueNumbers,
        PAIR_KIND: _Contacts,
    }
    return readers[_kind_of(task)](task)


def join_labels(encoded: Iterable[npt.NDArray[Any]], per_residue: bool) -> npt.NDArray[Any]:
    """The labels of all proteins: ``[n, k]`` or ``[n]``, or of all residues back to back."""
    return np.concatenate(list(encoded)) if per_residue else np.stack(list(encoded))


def _kind_of(task: TaskConfig) -> str:
    assert task.kind is not None
    return task.kind


def _number(value: object, column: str, place: str) -> float:
    """A cell as a number; NaN where there is none."""
    if value is None or (isinstance(value, str) and value.strip() in MISSING_VALUES | {""}):
        return math.nan
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(
            f"{place}: {value!r} in column {column!r} is not a number; correct it, or leave it empty"
        ) from None
    if math.isinf(number):
        raise UserError(f"{place}: {value!r} in column {column!r} is not finite; leave it empty")
    return number


def _check_length(labels: Sized, num_residues: int, column: str, place: str) -> None:
    if len(labels) != num_residues:
        raise UserError(
            f"{place}: {len(labels)} labels in column {column!r} for {num_residues} residues; "
            "give one for each"
        )


def _scale_of(task: TaskConfig, values: npt.NDArray[np.float64], names: Sequence[str]) -> TargetInfo:
    """Mean and standard deviation of each column of ``[n, k]``; 0 and 1 without scaling."""
    counts = np.count_nonzero(~np.isnan(values), axis=0)
    for name, count in zip(names, counts.tolist(), strict=True):
        if not count:
            raise UserError(f"the column {name!r} of data.train holds no number; correct task.target_columns")
    means = np.nanmean(values, axis=0)
    mean, std = np.zeros(len(names)), np.ones(len(names))
    if task.scale_targets:
        mean, std = means, np.nanstd(values, axis=0)
        std[std == 0.0] = 1.0  # all labels are equal
    return TargetInfo(
        _kind_of(task), list(names), counts.tolist(), mean.tolist(), std.tolist(), means.tolist()
    )


def _vocabulary(
    task: TaskConfig, labels: Sequence[str], names: Sequence[str] | None, total: int | None = None
) -> TargetInfo:
    """The classes in order: of numbers if all names are whole numbers, else of text.

    Args:
        task: For its kind.
        labels: Names, repeated.
        names: The classes where they are known; `encode` refuses others.
        total: How many could have each of them; None for the number of labels.
    """
    count_of = Counter(labels)
    if not count_of:
        raise UserError("data.train holds no label that counts; correct task.target_columns")
    if names is None:
        numeric = all(name.isdecimal() for name in count_of)
        names = sorted(count_of, key=lambda name: (int(name), name) if numeric else (0, name))
    counts = [count_of[name] for name in names]
    total = total or len(labels)
    return TargetInfo(_kind_of(task), list(names), counts, baseline=[count / total for count in counts])


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _number_of(name: str, info: TargetInfo, place: str) -> int:
    try:
        return info.names.index(name)
    except ValueError:
        raise UserError(
            f"{place}: the class {name!r} is none of those of the training data, or of the head that was "
            f"loaded: {_shown(info.names)}; correct the label, or remove the row"
        ) from None
