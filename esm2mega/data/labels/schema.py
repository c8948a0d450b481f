"""Describes the outputs of a head: the classes or the scale of each, as learned from training labels.

Legend: ``k`` outputs, ``m`` targets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import NUMERIC_KINDS, PAIR_KIND, RESIDUE_KINDS, classes_of_columns
from esm2mega.errors import UserError

IGNORED = -100
"""This labels a residue or protein that does not count, as in PyTorch's cross-entropy; numbers have NaN."""


@dataclass(frozen=True)
class Target:
    """Describes one thing that is predicted, with labels, a loss and metrics of its own.

    Attributes:
        name: Column of the target; empty where the task has one target.
        outputs: The slice of the k outputs that belongs to the target.
        names: Names of these outputs.
        untrained: Numbers, among these outputs, of the classes that no training has had a label of.
    """

    name: str
    outputs: slice
    names: list[str]
    untrained: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TargetInfo:
    """Says what predictions mean; made from the training labels and kept with the weights.

    Attributes:
        kind: The value of `task.kind`.
        names: Names of the outputs: the target columns for numbers, else the classes.
        counts: Number of training labels of each class (for multilabel, of proteins that have it), or of
            each numeric target.
        mean: What is subtracted from each numeric target for training; empty for classes.
        std: What each numeric target is divided by after that.
        baseline: Prediction of each output from the training labels alone: their mean, or the frequency of
            each class; for contacts the frequency at each distance along the chain, from 0. Empty in
            checkpoints of earlier versions.
        columns: The target columns where residues have classes in several columns; else empty.
        widths: How many of `names` are classes of each of `columns`.
        untrained: Numbers of the outputs whose class was declared, but has had no label in any training.
        forms: How classes of residues were written in each target column, see `esm2mega.data.labels.forms`.
            Empty for other kinds, and in checkpoints of earlier versions.
    """

    kind: str
    names: list[str]
    counts: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list, compare=False)
    columns: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    untrained: list[int] = field(default_factory=list, compare=False)
    forms: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        """Refuse names that no file of predictions could hold; JSON and Parquet can hold them as labels."""
        for name in self.names:
            if not name.isascii() and name != name.encode(errors="replace").decode():
                raise UserError(f"the label {name!r} is not text in UTF-8; correct it where it is written")

    @property
    def per_residue(self) -> bool:
        """Return whether labels are stored by residue, from which those of pairs follow."""
        return self.kind in RESIDUE_KINDS or self.per_pair

    @property
    def per_pair(self) -> bool:
        return self.kind == PAIR_KIND

    @property
    def num_outputs(self) -> int:
        """Return the width of the head."""
        return len(self.names)

    @property
    def targets(self) -> list[Target]:
        """Return a target for each column of numbers or of classes of residues; else one for all outputs."""
        columns, widths = self.columns, self.widths
        if self.kind in NUMERIC_KINDS:
            columns, widths = self.names, [1] * len(self.names)
        if len(columns) < 2:
            return [Target("", slice(0, self.num_outputs), self.names, self.untrained)]
        spans = [slice(*span) for span in pairwise(accumulate(widths, initial=0))]
        return [
            Target(name, span, self.names[span], self._untrained_in(span))
            for name, span in zip(columns, spans, strict=True)
        ]

    def _untrained_in(self, span: slice) -> list[int]:
        """Return the untrained outputs of one target, counted from its first output."""
        return [number - span.start for number in self.untrained if span.start <= number < span.stop]

    @property
    def output_names(self) -> list[str]:
        """Return a unique name for each output: with several columns of classes, ``COLUMN/CLASS``."""
        if not self.columns:
            return self.names
        return [f"{target.name}/{name}" for target in self.targets for name in target.names]

    def to_dict(self) -> dict[str, Any]:
        """Return the targets as plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> TargetInfo:
        """Invert `to_dict`."""
        return TargetInfo(**state)


def with_columns(info: TargetInfo, task: TaskConfig, location: str) -> TargetInfo:
    """Return the targets of `info` under the names of the columns of another table.

    Columns name numbers, flags, and the targets of residues, and their order is that of the outputs. Columns
    that are called differently are reported on rank 0.

    Args:
        info: Targets of a head that was trained.
        task: Section with the columns of the other table.
        location: Where that head is, for messages.

    Raises:
        UserError: The number of columns differs from the head's, or their order does; or classes are declared
            that are not those of the head.
    """
    _check_declared(info, task, location)
    requested = task.target_columns
    flags = info.kind == "multilabel" and len(requested) > 1
    columns = info.names if info.kind in NUMERIC_KINDS or flags else info.columns
    if len(requested) != max(len(columns), 1):
        what = "targets" if info.columns else "outputs"
        has = f"{len(columns)} {what}, {', '.join(columns)}; name a column for each"
        raise UserError(
            f"task.target_columns={requested}: the loaded head has "
            f"{has if columns else 'one column; name that'}"
        )
    if not columns or columns == requested:
        return info
    if set(columns) & set(requested) - {a for a, b in zip(columns, requested, strict=True) if a == b}:
        raise UserError(
            f"task.target_columns={requested}: the outputs of the loaded head have another order; set "
            f"task.target_columns=[{','.join(columns)}]"
        )
    if os.environ.get("RANK", "0") == "0":
        pairs = ", ".join(f"{a} for {b}" for a, b in zip(columns, requested, strict=True) if a != b)
        print(f"{location}: outputs of the loaded head: {pairs}", file=sys.stderr)
    return replace(info, columns=list(requested)) if info.columns else replace(info, names=list(requested))


def _check_declared(info: TargetInfo, task: TaskConfig, location: str) -> None:
    declared = classes_of_columns(task)
    if len(declared) != len(info.targets):
        return  # the number of columns is wrong too, which is said
    for names, target in zip(declared, info.targets, strict=True):
        if names is not None and names != target.names:
            raise UserError(
                f"task.classes={task.classes}: the head of {location} has the classes {target.names}; set "
                "task.classes=null, or train a new head"
            )
