"""Converts the head of a task to and from the classifier in the ``modules_to_save`` of a PEFT directory.

The classifier is that of `EsmForSequenceClassification` or `EsmForTokenClassification`, which peft trains in
full. The scale of numeric targets goes into its last layer, so that the logits are in the units of the
labels. PEFT has no place for the meaning of the logits, such as the names of the classes: it goes into the
file `TASK`, which peft does not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from esm2mega.config.schema import TaskConfig
from esm2mega.convert.heads.hf_classifiers import (
    ROWS,
    SEQUENCE,
    TOKEN,
    default_labels,
    describe_head,
    in_units_of_labels,
    unit_scale,
)
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import first_of, parse_json

TASK = "esm2mega_task.json"
PREFIX = "base_model.model.classifier."
MODULE = "classifier"
TASK_TYPES = {SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS"}
"""These are peft's names for the types of task of the two classes."""


def described(architecture: str, info: TargetInfo) -> str:
    """Return a line of the report that says which class loads an exported head."""
    return f"head     {architecture} with num_labels={info.num_outputs}: {first_of(info.names)}"


def to_theirs(architecture: str, head: Mapping[str, Tensor], info: TargetInfo) -> dict[str, Tensor]:
    """Return the classifier's tensors under peft's names, changed to give outputs in units of the labels."""
    return {
        theirs: in_units_of_labels(ours, head[ours], info, head[ours].dtype).contiguous()
        for theirs, ours in _names(architecture).items()
    }


def write_task(directory: Path, head: HeadDescription) -> None:
    """Write the file `TASK`, which says what the logits mean."""
    content = {"target_columns": head.task.target_columns, **unit_scale(head.info).to_dict()}
    (directory / TASK).write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Meaning:
    """Says what the logits of a classifier mean, for a directory that does not say it.

    Attributes:
        kind: The task, as in `task.kind`.
        names: Names of the outputs; None for ``LABEL_0`` and so on, as in transformers.
    """

    kind: str
    names: Sequence[str] | None = None


def has_meaning(source: Path, given: Meaning | None) -> bool:
    """Tell whether a classifier in this PEFT directory has a known meaning and can be the head of a task."""
    return given is not None or (source / TASK).exists()


def to_ours(
    source: Path, tensors: Mapping[str, Tensor], hidden_size: int, dropout: float, given: Meaning | None
) -> tuple[dict[str, Tensor], TaskConfig, TargetInfo]:
    """Convert the classifier of a PEFT directory to the head of a task.

    Args:
        source: The directory.
        tensors: Tensors of the classifier by their names in the file.
        hidden_size: Hidden size of the base.
        dropout: Dropout of the head in training.
        given: Meaning of the logits; None to read it from the file `TASK`.

    Returns:
        Tensors by their names in the model, the section ``task``, and what the predictions mean.

    Raises:
        UserError: The file `TASK` is incomplete, or the tensors are not those of such a head.
    """
    found = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in tensors.items()}
    if given is None:
        columns, info = _stored(source)
        head = describe_head(f"{source / TASK}: names", info.kind, info.names, hidden_size, dropout)
        head = replace(head, task=replace(head.task, target_columns=columns), info=info)
    else:
        (count, *_) = found.get("out_proj.bias") or found.get("bias") or (0,)
        labels = default_labels(count) if given.names is None else given.names
        location = str(source) if given.names is None else f"--labels {','.join(labels)}"
        head = describe_head(location, given.kind, labels, hidden_size, dropout)
    architecture = TOKEN if head.info.per_residue else SEQUENCE
    names = _names(architecture)
    shapes = {theirs.removeprefix(PREFIX): head.shapes[ours] for theirs, ours in names.items()}
    if found != shapes:
        raise UserError(
            f"{source}: {MODULE} has {found}, that of {architecture} with {head.info.num_outputs} labels has "
            f"{shapes}; leave it out with --drop"
        )
    return {ours: tensors[theirs] for theirs, ours in names.items()}, head.task, head.info


def _stored(source: Path) -> tuple[list[str], TargetInfo]:
    try:
        content = parse_json((source / TASK).read_text())
        columns, info = content.pop("target_columns"), TargetInfo.from_dict(content)
        if info.columns or info.widths:
            raise ValueError("columns and widths are of heads that transformers has not")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source / TASK}: not readable ({error}); leave {MODULE} out with --drop") from error
    return columns, info


def _names(architecture: str) -> dict[str, str]:
    """Return the names of the head's tensors in the model by their names in peft."""
    return {
        f"base_model.model.{row.theirs}".format(p=part): row.ours.format(p=part)
        for row in ROWS[architecture]
        for part in ("weight", "bias")
    }
