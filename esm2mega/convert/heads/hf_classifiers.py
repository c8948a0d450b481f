"""Converts heads of tasks to and from the sequence and token classifiers of transformers.

Names and config keys are those of transformers 4.30 to 5.23, ``EsmForSequenceClassification`` and
``EsmForTokenClassification``. transformers chooses the loss of a sequence model by ``problem_type``, and
without it by the labels in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.head_form import CLS_TANH, RESIDUE_LINEAR, head_form
from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.convert.lazy_weights import HeadDescription, Weights, number_from
from esm2mega.convert.name_table import Shape, TableRow
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError

SEQUENCE, TOKEN = "EsmForSequenceClassification", "EsmForTokenClassification"
_OUTPUT = "head.output."
ROWS = {
    SEQUENCE: (
        TableRow("head.dense.{p}", "classifier.dense.{p}"),
        TableRow(_OUTPUT + "{p}", "classifier.out_proj.{p}"),
    ),
    TOKEN: (TableRow(_OUTPUT + "{p}", "classifier.{p}"),),
}
"""These rows give our names and those of transformers for the tensors of each class."""
SEQUENCE_KINDS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}
"""This table gives the `task.kind` of each ``problem_type``."""

_EQUALS: dict[str, tuple[tuple[str, ...], dict[str, str | None]]] = {
    SEQUENCE: (CLS_TANH, {kind: problem for problem, kind in SEQUENCE_KINDS.items()}),
    TOKEN: (RESIDUE_LINEAR, {"token_classification": None, "token_regression": "regression"}),
}
"""This table gives the form of each class's head, and the ``problem_type`` of each `task.kind` it has."""


def find_equal(head: HeadDescription) -> str | None:
    """Return the class of transformers that computes the same as `head`.

    It is None if there is no such class, as for a user's own head or for several targets of residues.
    """
    name = _class_of(head)
    return name if name is not None and head.shapes.keys() == _tensors(name) else None


def has_class(head: HeadDescription) -> bool:
    """Tell whether a configured head has a class of transformers, whatever its tensors are."""
    return _class_of(head) is not None


def _class_of(head: HeadDescription) -> str | None:
    if _several_of_residues(head) or not head.is_configured:
        return None
    form, kind = head_form(head.task), head.task.kind
    return next((name for name, (own, kinds) in _EQUALS.items() if form == own and kind in kinds), None)


def _several_of_residues(head: HeadDescription) -> bool:
    return head.info.per_residue and len(head.info.targets) > 1


def _tensors(architecture: str) -> set[str]:
    """Return our names of the tensors of the head."""
    return {row.ours.format(p=part) for row in ROWS[architecture] for part in ("weight", "bias")}


def architecture_of(head: HeadDescription) -> str:
    """Return the class of transformers that computes the same as `head`.

    Raises:
        UserError: There is no such class.
    """
    if (name := find_equal(head)) is not None:
        return name
    plain = head.is_configured and not _several_of_residues(head)
    other = ", or train with task.head=hf" if plain else ""
    raise UserError(f"{no_equal(head)}; --drop-head writes the encoder without it{other}")


def no_equal(head: HeadDescription) -> str:
    """Return why no class of transformers computes the same as `head`."""
    task = head.task
    if head.code is not None and not head.is_configured:
        name = head.code.head or head.code.model or head.code.loss
        return f"transformers has no equivalent of {name}, which is your own code"
    if _several_of_residues(head):
        return (
            f"transformers has no equivalent of a head for {len(head.info.targets)} columns of residues "
            f"(task.target_columns={task.target_columns})"
        )
    return (
        f"transformers has no equivalent of the head {' '.join(head_form(task))} (task.head={task.head}, "
        f"task.kind={task.kind})"
    )


def head_rows(head: HeadDescription) -> tuple[TableRow, ...]:
    """Return the rows of transformers' name table for the head."""
    return ROWS[architecture_of(head)]


def find_head(
    location: Path, infos: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> HeadDescription | None:
    """Find the head of a classifier among the tensors of a directory; return None if there is none.

    Args:
        location: Path of ``config.json``, named in errors.
        infos: Shapes and dtypes of all tensors by name.
        config: Content of `location`.

    Raises:
        UserError: Labels and tensors do not fit together, or no `task.kind` has this ``problem_type``.
    """
    outputs = {SEQUENCE: "classifier.out_proj.weight", TOKEN: "classifier.weight"}
    found = [(name, infos[stored]) for name, stored in outputs.items() if stored in infos]
    if not found or len(found[0][1].shape) != 2:
        return None
    name, (num_outputs, hidden_size) = found[0][0], found[0][1].shape
    labels = _labels(location, config, num_outputs)
    kind = _kind(location, name, config.get("problem_type"), num_outputs)
    return describe_head(f"{location}: id2label", kind, labels, hidden_size, dropout_of(location, config))


def describe_head(
    location: str, kind: str, labels: Sequence[str], hidden_size: int, dropout: float
) -> HeadDescription:
    """Describe the head of a classification model whose outputs are in units of the labels.

    Args:
        location: Where `labels` come from, named in errors.
        kind: The task, as in `task.kind`.
        labels: Name of each output.
        hidden_size: Hidden size of the encoder.
        dropout: Dropout of the head in training.

    Raises:
        UserError: transformers has no such model.
    """
    architecture = next((name for name, (_, kinds) in _EQUALS.items() if kind in kinds), None)
    if architecture is None:
        raise UserError(f"{location}: task.kind={kind} has no equal in transformers")
    refuse_repeated(location, labels)
    if kind == "token_regression" and len(labels) > 1:
        raise UserError(f"{location}: {TOKEN} with {len(labels)} numbers per residue has no equal here")
    head = "hf" if architecture == SEQUENCE else "linear"
    task, info = outputs_in_units(TaskConfig(kind=kind, head=head, dropout=dropout), labels)
    return HeadDescription(task, info, shapes_of(architecture, hidden_size, len(labels)))


def refuse_repeated(location: str, labels: Sequence[str]) -> None:
    """Refuse a name that two outputs have; `location` is where they come from."""
    if repeated := sorted(label for label, count in Counter(labels).items() if count > 1):
        raise UserError(f"{location} has {repeated[0]!r} twice; give each output a name of its own")


def outputs_in_units(task: TaskConfig, labels: Sequence[str]) -> tuple[TaskConfig, TargetInfo]:
    """Return the section ``task`` with its columns, and the meaning of outputs in units of the labels."""
    kind, several = str(task.kind), len(labels) > 1 and task.kind == "multilabel"
    if kind in NUMERIC_KINDS or several:
        task = replace(task, target_columns=list(labels))
    scale = ([0.0] * len(labels), [1.0] * len(labels)) if kind in NUMERIC_KINDS else ([], [])
    return task, TargetInfo(kind, list(labels), [], *scale)


def shapes_of(architecture: str, hidden_size: int, num_outputs: int) -> dict[str, Shape]:
    """Return the shapes of the tensors of a class's head under our names."""
    h, k = hidden_size, num_outputs
    shapes: dict[str, Shape] = {f"{_OUTPUT}weight": (k, h), f"{_OUTPUT}bias": (k,)}
    if architecture == SEQUENCE:
        shapes |= {"head.dense.weight": (h, h), "head.dense.bias": (h,)}
    return shapes


def dropout_of(location: Path, config: Mapping[str, Any]) -> float:
    """Return the dropout of the head in training, ``hidden_dropout_prob``, which is 0.1 if absent."""
    return number_from(location, config, "hidden_dropout_prob", 0.1)


def default_labels(count: int) -> list[str]:
    """Return the names that transformers gives to outputs without names."""
    return [f"LABEL_{number}" for number in range(count)]


def _labels(location: Path, config: Mapping[str, Any], num_outputs: int) -> list[str]:
    """Return the names of the outputs, or the defaults of transformers if none are given."""
    given = config.get("id2label")
    if given is None:
        return default_labels(num_outputs)
    if not isinstance(given, dict) or not all(isinstance(label, str) for label in given.values()):
        raise UserError(f"{location}: id2label is no table of numbers and names")
    if {str(number) for number in given} != {str(number) for number in range(num_outputs)}:
        raise UserError(
            f"{location}: id2label numbers {len(given)} labels, the classifier has {num_outputs} outputs; "
            "they must be 0, 1 and so on, one for each"
        )
    return [str(given[str(number)]) for number in range(num_outputs)]


def _kind(location: Path, architecture: str, problem: Any, num_outputs: int) -> str:
    """Return the `task.kind` of a model of transformers."""
    if architecture == TOKEN:
        if problem not in (None, "single_label_classification", "regression"):
            raise UserError(f"{location}: problem_type {problem!r} of {TOKEN} has no equal here")
        is_numeric = problem == "regression" or num_outputs == 1
        return "token_regression" if is_numeric else "token_classification"
    return kind_of_problem(location, problem, num_outputs)


def kind_of_problem(location: Path, problem: Any, num_outputs: int) -> str:
    """Return the `task.kind` of a model of sequences by its ``problem_type``, or without one.

    Raises:
        UserError: The ``problem_type`` is not known.
    """
    if problem is None:
        return "regression" if num_outputs == 1 else "classification"
    if problem not in SEQUENCE_KINDS:
        raise UserError(f"{location}: problem_type is {problem!r}; known are {', '.join(SEQUENCE_KINDS)}")
    return SEQUENCE_KINDS[problem]


def head_notes(head: HeadDescription, config: Mapping[str, Any]) -> list[str]:
    """Return notes on what was assumed where ``config.json`` says nothing."""
    notes = []
    if "id2label" not in config:
        notes.append(f"names of the labels: {', '.join(head.info.names[:3])} and so on, the source has none")
    if config.get("problem_type") is None and not head.info.per_residue:
        notes.append(f"problem_type: taken for {head.task.kind}, the source does not say")
    return notes


def config_of_head(head: HeadDescription) -> dict[str, Any]:
    """Return the keys of ``config.json`` that differ from those of a masked language model."""
    name = architecture_of(head)
    keys: dict[str, Any] = {
        "architectures": [name],
        "id2label": {str(number): label for number, label in enumerate(head.info.names)},
        "label2id": {label: number for number, label in enumerate(head.info.names)},
    }
    problem = _EQUALS[name][1][str(head.task.kind)]
    return keys if problem is None else {**keys, "problem_type": problem}


def with_unit_scale(weights: Weights, dtype: torch.dtype) -> Weights:
    """Change the head's last layer so that outputs are in units of the labels, see `in_units_of_labels`.

    Args:
        weights: A model with a head that the other format has.
        dtype: Dtype of the file to be written, to which the last layer of the head is rounded.
    """
    head = weights.description.task
    assert head is not None
    info, read = head.info, weights.read
    if not (any(info.mean) or any(std != 1.0 for std in info.std)):
        return weights
    weights.notes.changed.append(
        f"scale of the labels (mean {_shown(info.mean)}, standard deviation {_shown(info.std)}): "
        "now part of the head's last layer"
    )
    description = replace(weights.description, head=replace(head, info=unit_scale(info)))
    return replace(
        weights,
        description=description,
        read=lambda name: in_units_of_labels(name, read(name), info, dtype),
    )


def in_units_of_labels(name: str, value: Tensor, info: TargetInfo, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a head, changed so that outputs are in units of the labels.

    The scale and the shift after the head of a regression become part of its last layer, computed in fp64 and
    rounded once to `dtype`: ``s (W x + b) + m = (s W) x + (s b + m)`` for each output. Of a weight-normed
    layer, which then has one output, it is the length of the weight that is scaled.
    """
    if not info.mean or name not in (f"{_OUTPUT}weight", f"{_OUTPUT}weight_g", f"{_OUTPUT}bias"):
        return value
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in (info.mean, info.std))
    if name == f"{_OUTPUT}weight_g":
        return (value.double() * std).to(dtype)
    if name == f"{_OUTPUT}weight":
        return (value.double() * std[:, None]).to(dtype)
    return (value.double() * std + mean).to(dtype)


def unit_scale(info: TargetInfo) -> TargetInfo:
    """Return what the outputs mean once they are in units of the labels: mean 0, standard deviation 1."""
    return replace(info, mean=[0.0] * len(info.mean), std=[1.0] * len(info.std))


def _shown(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
