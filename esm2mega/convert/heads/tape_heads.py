"""Converts heads of tasks to and from those of TAPE and of ProteinLM's TAPE.

Names are those of tape-proteins 0.5 and THUDM/ProteinLM, ``tape/models/modeling_utils.py``. A batch
normalisation is stored there with statistics of its inputs; here it is the scale and shift that it applies in
evaluation, and is written with a mean of 0 and a variance that makes its divisor 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.config.head_form import (
    PRODUCT,
    PROTEINLM_PROTEIN,
    RESIDUAL_BLOCKS,
    TAPE_PROTEIN,
    TAPE_RESIDUES,
    head_form,
)
from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import PAIR_KIND
from esm2mega.convert.heads.hf_classifiers import outputs_in_units, refuse_repeated
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.name_table import Kind, Shape, TableRow
from esm2mega.errors import UserError
from esm2mega.model.heads.tape_heads import BLOCKS, CHANNELS, RESIDUE_WIDTH, WIDTHS

_LENGTH = Kind(
    lambda parts, _: parts[0].reshape(1), lambda value, _, __: [value.reshape(())], lambda shape: ()
)
"""The length of a weight-normed weight has no axis in TAPE."""

_AS_CONVOLUTION = Kind(
    lambda parts, _: parts[0][:, :, 0, 0],
    lambda value, _, __: [value[:, :, None, None]],
    lambda shape: (*shape, 1, 1),
)
"""A linear layer on maps is stored as a 1 x 1 convolution."""

EPSILON = 1e-5
"""Is what PyTorch's batch normalisation adds to a variance."""


def _weight_normed(ours: str, theirs: str) -> tuple[TableRow, ...]:
    return (
        TableRow(f"{ours}.weight_v", f"{theirs}.weight_v"),
        TableRow(f"{ours}.weight_g", f"{theirs}.weight_g", _LENGTH),
        TableRow(f"{ours}.bias", f"{theirs}.bias"),
    )


def _two_layers(prefix: str, first: int, second: int) -> tuple[TableRow, ...]:
    return (
        *_weight_normed("head.first", f"{prefix}.main.{first}"),
        *_weight_normed("head.output", f"{prefix}.main.{second}"),
    )


_VALUE, _CLASSIFY = "predict.value_prediction", "classify.classify"
_POOLER = TableRow("head.dense.{p}", "bert.pooler.dense.{p}")
_OF_RESIDUES = (TableRow("head.norm.{p}", f"{_CLASSIFY}.main.0.{{p}}"), *_two_layers(_CLASSIFY, 1, 4))
_PAIRS = "predict.predict"
_RESIDUAL = tuple(
    TableRow(f"head.blocks.{k}.{ours}", f"{_PAIRS}.ResidualBlock{k}.{theirs}")
    for k in range(BLOCKS)
    for ours, theirs in (
        *((f"conv{n}.weight", f"conv{n}.weight") for n in (1, 2)),
        *((f"norm{n}.{{p}}", f"bn{n}.{{p}}") for n in (1, 2)),
    )
)


@dataclass(frozen=True)
class TapeHead:
    """Describes the head of one class of TAPE or ProteinLM.

    Attributes:
        kind: The value of `task.kind`.
        form: The form of the head, see `esm2mega.config.head_form`.
        rows: Rows of the name table.
        output: Name of the stored tensor whose first axis is the number of outputs.
        width: Width of the hidden layer, which is fixed in these packages; None if there is none.
        dropout: Dropout in training there.
        normed: Prefixes of batch normalisations.
    """

    kind: str
    form: tuple[str, ...]
    rows: tuple[TableRow, ...]
    output: str
    width: int | None = None
    dropout: float = 0.0
    normed: tuple[str, ...] = ()


def _heads(format_name: str) -> tuple[TapeHead, ...]:
    is_tape = format_name == "tape"
    form, pooler = (TAPE_PROTEIN, (_POOLER,)) if is_tape else (PROTEINLM_PROTEIN, ())
    width = WIDTHS[format_name]
    proteins = [
        TapeHead(kind, form, (*pooler, *_two_layers(prefix, 0, 3)), f"{prefix}.main.3.weight_v", width)
        for kind, prefix in (("regression", _VALUE), ("classification", _CLASSIFY))
    ]
    residues = TapeHead(
        "token_classification",
        TAPE_RESIDUES,
        _OF_RESIDUES,
        f"{_CLASSIFY}.main.4.weight_v",
        RESIDUE_WIDTH,
        normed=(f"{_CLASSIFY}.main.0",),
    )
    linear = TableRow("head.output.{p}", f"{_PAIRS}.1.{{p}}")
    product = TapeHead(PAIR_KIND, PRODUCT, (linear,), f"{_PAIRS}.1.weight", dropout=0.5)
    first = (
        TableRow("head.first.weight", f"{_PAIRS}.1.weight", _AS_CONVOLUTION),
        TableRow("head.first.bias", f"{_PAIRS}.1.bias"),
    )
    last = TableRow("head.output.{p}", "predict.linear.0.{p}")
    residual = TapeHead(
        PAIR_KIND,
        RESIDUAL_BLOCKS,
        (*first, *_RESIDUAL, last),
        "predict.linear.0.weight",
        dropout=0.5,
        normed=tuple(f"{_PAIRS}.ResidualBlock{k}.bn{n}" for k in range(BLOCKS) for n in (1, 2)),
    )
    return (*proteins, residues, product if is_tape else residual)


HEADS = {name: _heads(name) for name in ("tape", "proteinlm")}
"""Maps each format to the heads that it can hold."""


def equal_head(head: HeadDescription, format_name: str) -> TapeHead:
    """Return the head of a format that computes the same as `head`.

    Raises:
        UserError: The format has no such head.
    """
    task, info = head.task, head.info
    found = next((x for x in HEADS[format_name] if (x.kind, x.form) == (task.kind, head_form(task))), None)
    advice = f"; train with task.head={format_name}, or give --drop-head to write the encoder alone"
    is_plain = head.is_configured and found is not None
    if found is None or not is_plain or head.shapes.keys() != shapes_of(found, 0, 0).keys():
        what = f"task.head={task.head} for task.kind={task.kind}" if found is None else "a user's own head"
        raise UserError(f"{format_name} has no equivalent of {what}{advice}")
    if found.width is not None and (task.hidden_size or found.width) != found.width:
        raise UserError(
            f"task.hidden_size={task.hidden_size}: {format_name} has {found.width} in this head{advice}"
        )
    if len(info.targets) > 1:
        raise UserError(
            f"task.target_columns={task.target_columns}: {format_name} predicts one of them; train on one "
            "column, or give --drop-head to write the encoder alone"
        )
    return found


def find_head(
    location: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], format_name: str
) -> tuple[TapeHead, HeadDescription] | None:
    """Find the head of a task among the tensors of a directory; return None if there is none.

    Args:
        location: Path of ``config.json``, named in errors.
        tensors: Tensors by stored name.
        config: Content of `location`.
        format_name: ``tape`` or ``proteinlm``.

    Raises:
        UserError: The names of the outputs do not fit the tensors.
    """
    found = next((head for head in HEADS[format_name] if head.output in tensors), None)
    if found is None:
        return None
    if not (shape := tensors[found.output].shape):
        raise UserError(f"{location.parent}: {found.output} has no axis of outputs; copy the file again")
    names = _names(location, config, found.kind, shape[0])
    task = TaskConfig(kind=found.kind, head=format_name, dropout=found.dropout)
    task, info = outputs_in_units(task, names)
    hidden_size = config.get("hidden_size")
    shapes = shapes_of(found, hidden_size if isinstance(hidden_size, int) else 0, len(names))
    return found, HeadDescription(task, info, shapes)


def _names(location: Path, config: Mapping[str, Any], kind: str, num_outputs: int) -> list[str]:
    """Return the names of the outputs: those of ``id2label``, else the numbers that TAPE's labels are."""
    if kind == PAIR_KIND:
        return [PAIR_KIND]
    if kind == "regression" and num_outputs != 1:
        raise UserError(f"{location}: its head has {num_outputs} values; TAPE's has one")
    given = config.get("id2label")
    if given is None:
        return ["target"] if kind == "regression" else [str(number) for number in range(num_outputs)]
    numbers = [str(number) for number in range(num_outputs)]
    if not isinstance(given, dict) or sorted(given) != sorted(numbers):
        raise UserError(f"{location}: id2label must name the outputs 0 to {num_outputs - 1}, each once")
    names = [str(given[number]) for number in numbers]
    refuse_repeated(f"{location}: id2label", names)
    return names


def shapes_of(head: TapeHead, hidden_size: int, num_outputs: int) -> dict[str, Shape]:
    """Return the shapes of the tensors of a head under our names."""
    h, k, width = hidden_size, num_outputs, head.width or 0
    if head.kind == PAIR_KIND:
        shapes: dict[str, Shape] = {"head.output.bias": (2,)}
        if head.form == PRODUCT:
            return {**shapes, "head.output.weight": (2, 2 * h)}
        c = CHANNELS
        shapes |= {"head.output.weight": (2, c), "head.first.weight": (c, 2 * h), "head.first.bias": (c,)}
        for block in range(BLOCKS):
            for n in (1, 2):
                at = f"head.blocks.{block}."
                shapes |= {f"{at}conv{n}.weight": (c, c, 3, 3)}
                shapes |= {f"{at}norm{n}.weight": (c,), f"{at}norm{n}.bias": (c,)}
        return shapes
    kernels: tuple[Shape, Shape] = ((5,), (3,)) if head.form == TAPE_RESIDUES else ((), ())
    shapes = {
        "head.first.weight_v": (width, h, *kernels[0]),
        "head.first.weight_g": (1,),
        "head.first.bias": (width,),
        "head.output.weight_v": (k, width, *kernels[1]),
        "head.output.weight_g": (1,),
        "head.output.bias": (k,),
    }
    if head.form == TAPE_RESIDUES:
        shapes |= {"head.norm.weight": (h,), "head.norm.bias": (h,)}
    if head.form == TAPE_PROTEIN:
        shapes |= {"head.dense.weight": (h, h), "head.dense.bias": (h,)}
    return shapes


def fold_statistics(head: TapeHead, tensors: dict[str, Tensor], location: Path) -> list[str]:
    """Replace batch normalisations by the scale and shift that they apply in evaluation, in place.

    ``(x - mean) / sqrt(variance + epsilon) * weight + bias``, computed in fp64 and rounded once.

    Returns:
        A note, if there were any.

    Raises:
        UserError: Statistics are missing, or of another shape than the weight.
    """
    for prefix in head.normed:
        parts = [f"{prefix}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if absent := [name for name in parts if name not in tensors]:
            raise UserError(f"{location}: 1 tensor is missing: {absent[0]}")
        weight, bias, mean, variance = (tensors[name].double() for name in parts)
        if len({x.shape for x in (weight, bias, mean, variance)}) > 1:
            raise UserError(f"{location}: the parts of {prefix} differ in shape; copy the file again")
        dtype = tensors[parts[0]].dtype
        scale = weight / torch.sqrt(variance + EPSILON)
        tensors[parts[0]], tensors[parts[1]] = scale.to(dtype), (bias - mean * scale).to(dtype)
        for name in (*parts[2:], f"{prefix}.num_batches_tracked"):
            tensors.pop(name, None)
    if not head.normed:
        return []
    return ["statistics of batch normalisations: now part of their scale and shift, which training changes"]


def statistics(head: TapeHead, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the statistics with which batch normalisations apply their scale and shift alone.

    They are fp32 at least: in 16 bits the variance would be 1, and the divisor would not.
    """
    result = {}
    for prefix in head.normed:
        weight = tensors[f"{prefix}.weight"]
        mean = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        result[f"{prefix}.running_mean"] = mean
        result[f"{prefix}.running_var"] = torch.full_like(mean, 1.0 - EPSILON)
        result[f"{prefix}.num_batches_tracked"] = torch.tensor(0)
    return result


def config_of_head(head: HeadDescription) -> dict[str, Any]:
    """Return the keys of ``config.json`` for the head; TAPE keeps keys that it does not know."""
    if head.info.per_pair:
        return {}
    keys: dict[str, Any] = {"id2label": {str(n): name for n, name in enumerate(head.info.names)}}
    is_classes = head.task.kind != "regression"
    return {**keys, "num_labels": head.info.num_outputs} if is_classes else keys
