"""Converts heads of tasks to and from the classifier of ESM-2 in Cerebras Model Zoo.

Names and parameters are those of Model Zoo 2.3, ``models/nlp/esm2/classification``: a dense layer on `<cls>`,
GELU, dropout, linear. The classifier holds the masked language model as ``model``, of which it uses the
encoder, and the encoder once more as a part of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.head_form import CLS_GELU, head_form
from esm2mega.config.schema import TaskConfig
from esm2mega.convert.heads.hf_classifiers import (
    SEQUENCE_KINDS,
    default_labels,
    kind_of_problem,
    outputs_in_units,
)
from esm2mega.convert.lazy_weights import HeadDescription, number_from
from esm2mega.convert.name_table import TableRow
from esm2mega.errors import UserError

DENSE, OUTPUT = "bert_pooler.pooler.ffn.0.linear_layer.", "classifier."
"""These are the names of the two layers within the classifier."""

ROWS = (
    TableRow("head.dense.{p}", DENSE + "{p}"),
    TableRow("head.output.{p}", OUTPUT + "{p}"),
)

_INSIDE = "classifier."
_SECOND_ENCODER = _INSIDE + "bert_encoder."


def name_in_table(stored: str) -> str:
    """Return the name of a tensor without the modules that a checkpoint may hold it in."""
    if stored.startswith((_INSIDE + DENSE, _INSIDE + OUTPUT, _SECOND_ENCODER)):
        return stored.removeprefix(_INSIDE)
    return stored.removeprefix("model.")


def stored_name(name: str) -> str:
    """Return the name that a tensor has in a checkpoint of the classifier."""
    return _INSIDE + name if name.startswith((DENSE, OUTPUT)) else f"model.{name}"


def find_head(
    location: Path, infos: Mapping[str, TensorInfo], parameters: Mapping[str, Any]
) -> HeadDescription | None:
    """Find the head of a classifier among tensors with names of the table; return None if there is none.

    Args:
        location: File of the parameters, named in errors.
        infos: Shapes and dtypes of all tensors by name.
        parameters: Its section ``model``.

    Raises:
        UserError: Parameters and tensors do not fit together, or no `task.kind` has this ``problem_type``.
    """
    output = infos.get(f"{OUTPUT}weight")
    if output is None or len(output.shape) != 2:
        return None
    count, h = output.shape
    if parameters.get("num_labels", count) != count:
        raise UserError(
            f"{location}: num_labels is {parameters['num_labels']!r}, the classifier has {count} outputs; "
            "copy the parameters of this checkpoint there"
        )
    kind = kind_of_problem(location, parameters.get("problem_type"), count)
    dropout = number_from(location, parameters, "classifier_dropout", 0.0)
    # Labels are whole numbers there, which are also the names of the classes in tables.
    labels = [str(number) for number in range(count)] if kind == "classification" else default_labels(count)
    task = TaskConfig(kind=kind, head="pooler", pooler_activation="gelu", dropout=dropout)
    task, info = outputs_in_units(task, labels)
    shapes = {
        "head.dense.weight": (h, h),
        "head.dense.bias": (h,),
        "head.output.weight": (count, h),
        "head.output.bias": (count,),
    }
    return HeadDescription(task, info, shapes)


def parameters_of(head: HeadDescription) -> dict[str, Any]:
    """Return the parameters of a classifier that those of a masked language model lack.

    Raises:
        UserError: The classifier computes something else than `head`.
    """
    problems = {kind: problem for problem, kind in SEQUENCE_KINDS.items()}
    task = head.task
    if not head.is_configured or head_form(task) != CLS_GELU or task.kind not in problems:
        raise UserError(
            f"Model Zoo's classifier of ESM-2 has no equivalent of this head (task.head={task.head}, "
            f"task.kind={task.kind}); it has that of task.head=pooler task.pooler_activation=gelu for labels "
            "of proteins; --drop-head writes the encoder without it"
        )
    return {
        "num_labels": len(head.info.names),
        "problem_type": problems[str(task.kind)],
        "classifier_dropout": task.dropout,
    }
