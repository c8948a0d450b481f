"""Describes the outputs of a head: the classes or the scale of each, learned from training labels.

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
from esm2mega.config.task import NUMERIC_KINDS, PAIR_KIND, RESIDUE_KINDS
from esm2mega.errors import UserError

IGNORED = -100
"""Label of a residue or protein that does not count, as in PyTorch's cross-entropy. For numbers it is NaN."""


@dataclass(frozen=True)
class Target:
    """One thing that is predicted, with labels, a loss and metrics of its own.

    Attributes:
        name: Its column; empty where the task has one target.
        outputs: Its share of the k outputs.
        names: Of these.
    """

    name: str
    outputs: slice
    names: list[str]


@dataclass(frozen=True)
class TargetInfo:
    """Says what predictions mean; made from the training labels and kept with the weights.

    Attributes:
        kind: `task.kind`.
        names: Of the outputs: target columns of numbers, classes of all others.
        counts: Training labels of each class (of multilabel: proteins that have it); of numbers, how many.
        mean: Subtracted from each numeric target for training; empty for classes.
        std: Divides it.
        baseline: What one predicts who knows the training labels alone: their mean, or the frequency of each
            class; of each output. Of contacts their frequency at each distance along the chain, from 0. Empty
            in checkpoints of earlier versions.
        columns: Where residues have classes in several columns, these; else empty.
        widths: How many of `names` are classes of each of `columns`.
    """

    kind: str
    names: list[str]
    counts: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list, compare=False)
    columns: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

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

    @property
    def targets(self) -> list[Target]:
        """Each column of numbers, or of classes of residues; else all outputs as one."""
        columns, widths = self.columns, self.widths
        if self.kind in NUMERIC_KINDS:
            columns, widths = self.names, [1] * len(self.names)
        if len(columns) < 2:
            return [Target("", slice(0, self.num_outputs), self.names)]
        spans = [slice(*span) for span in pairwise(accumulate(widths, initial=0))]
        return [Target(name, span, self.names[span]) for name, span in zip(columns, spans, strict=True)]

    @property
    def output_names(self) -> list[str]:
        """A name for each output that no other has: where there are several columns of classes, with them."""
        if not self.columns:
            return self.names
        return [f"{target.name}/{name}" for target in self.targets for name in target.names]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> TargetInfo:
        """Inverse of `to_dict`."""
        return TargetInfo(**state)


def with_columns(info: TargetInfo, task: TaskConfig, location: str) -> TargetInfo:
    """Return the same targets with the columns of another table.

    They name numbers, flags, and the targets of residues, and their order is that of the outputs. Another
    name for a single one is reported on rank 0.

    Args:
        info: Of a head that was trained.
        task: With the columns.
        location: Where that head is, for messages.

    Raises:
        UserError: Another number of columns than it has, or another order.
    """
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
