"""Loads weights of any format into the part of a model that this rank holds, at any parallel layout."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.checkpoint.store import load_weights
from esm2mega.checkpoint.tensor_filter import (
    ALL,
    LM_HEAD,
    TASK_HEAD,
    TensorFilter,
    compare_tensors,
    for_task,
)
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ModelConfig, Run
from esm2mega.convert.files.distributed_writer import stacked_name
from esm2mega.convert.heads.contact_head import WEIGHT, fill_head, is_regression
from esm2mega.convert.lazy_weights import Weights
from esm2mega.convert.name_table import LAYER
from esm2mega.convert.start_point import StartPoint, starts_with_contact_head
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.model.freezing import gathered


def load_initial_weights(
    start: StartPoint, config: ModelConfig, model: Sequence[Any], tensor_filter: TensorFilter = ALL
) -> dict[str, Tensor]:
    """Fill the model from a checkpoint in any format; every rank calls this and reads what it needs.

    Rank 0 prints a line for everything that is not carried over unchanged.

    Args:
        start: The checkpoint that `init_from` names.
        config: The section ``model`` of the configuration, which must agree with the checkpoint.
        model: This rank's chunks of the model.
        tensor_filter: Chooses the tensors to load.

    Returns:
        Auxiliary tensors of the checkpoint by name.

    Raises:
        UserError: The checkpoint is not readable, or its model has another shape or other numerics.
    """
    check_same_model(f"init_from={start.path}", start.run.model, config, "give another init_from")
    if start.is_own:
        _say(load_weights(start.path, model, tensor_filter))
    else:
        _say(start.weights.notes.lines())
        _say(fill_model(start.weights, model, tensor_filter))
    return start.auxiliary()


def load_for_task(start: StartPoint, run: Run, model: Sequence[Any]) -> dict[str, Tensor]:
    """Fill a model with the head of a task as `load_initial_weights` does.

    The head starts as `finetune.load_head` says, which may mean from the contact head of a pretrained model.
    """
    _check_skipped(run.finetune.skip, model)
    if not starts_with_contact_head(start, run.task, run.finetune):
        auxiliary = load_initial_weights(start, run.model, model, for_task(run.finetune))
        if is_regression(run.task) and not run.finetune.load_head and WEIGHT in auxiliary:
            _say(["contact head: not the start, which is zero; finetune.load_head=true starts with it"])
        return auxiliary
    tensor_filter = for_task(replace(run.finetune, load_head=False))
    auxiliary = load_initial_weights(start, run.model, model, tensor_filter)
    fill_head(model, auxiliary)
    _say(["contact head: the start of the head"])
    return auxiliary


def _check_skipped(prefixes: Sequence[str], model: Sequence[Any]) -> None:
    """Refuse a prefix of `finetune.skip` that no weight has; all ranks call this together."""
    if not prefixes:
        return
    own = [
        stacked_name(chunk.global_parameter_name(name))[0]
        for chunk in unwrap_model(list(model))
        for name, _ in chunk.named_parameters()
    ]
    names = gathered(own)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            shown = ", ".join(names[:: max(1, len(names) // 3)])
            raise UserError(
                f"finetune.skip: no weight of the model has a name that begins with {prefix!r}; names are "
                f"such as {shown}"
            )


_NUMERICS = ("family", "layernorm_epsilon", "activation", "final_layernorm", "max_positions")
"""These keys change the numbers of a model, and no shape of a tensor shows them."""


def check_same_model(location: str, found: ModelConfig, configured: ModelConfig, cure: str) -> None:
    """Refuse weights that do not fit the configured model: of another shape, or with another meaning.

    Args:
        location: Where the weights are, named in errors.
        found: Section ``model`` of the weights.
        configured: Section ``model`` of the configuration.
        cure: What the user can do about another shape, for the error.

    Raises:
        UserError: The shape or one of `_NUMERICS` differs.
    """
    if (theirs := shape_of(found)) != (ours := shape_of(configured)):
        raise UserError(f"{location}: holds a model of {theirs}, the configuration says {ours}; {cure}")
    for key in _NUMERICS:
        if (theirs_value := getattr(found, key)) != (ours_value := getattr(configured, key)):
            raise UserError(
                f"{location}: its weights go with model.{key}={theirs_value}, the configuration says "
                f"{ours_value}; set model.{key}={theirs_value}"
            )


def _say(lines: Sequence[str]) -> None:
    """Print, on rank 0, the lines that say what is not carried over unchanged."""
    if lines and os.environ.get("RANK", "0") == "0":
        print("\n".join(f"init_from {line}" for line in lines), file=sys.stderr)


@torch.no_grad()
def fill_model(weights: Weights, model: Sequence[Any], tensor_filter: TensorFilter = ALL) -> list[str]:
    """Copy this rank's share of every tensor of `tensor_filter` into the chunks `model`, in place.

    Returns:
        What was not copied, a line each; empty unless `tensor_filter` is lenient.

    Raises:
        UserError: A tensor is missing or has another shape.
    """
    entries = [entry for entry in entries_of(model) if not tensor_filter.excluded(entry.key, entry.data)]
    shapes = {name: info.shape for name, info in weights.infos.items()}
    location = weights.origin.get("path", "weights")
    # Tensors without a place in the model have been reported, or are kept beside it as auxiliary tensors.
    report = compare_tensors(entries, shapes, replace(tensor_filter, unused=lambda name: True), location)
    lines = [
        *(f"initial: a part of {name}: {why}" for name, why in weights.absent.items() if name in shapes),
        *report.lines(weights.absent),
    ]
    if tensor_filter.strict and lines:
        raise UserError(
            f"{location}: {lines[0]}; set finetune.load_head=false or finetune.strict=false, "
            "or give another init_from"
        )
    narrowed = report.narrowed(tensor_filter)
    for entry in entries:
        if not narrowed.excluded(entry.key, entry.data):
            value = _share(weights.read(entry.key), entry)
            if entry.key in weights.absent and weights.present is not None:
                there = _share(weights.present(entry.key), entry)
                value = torch.where(there, value.to(entry.data), entry.data)
            entry.data.copy_(value)
    if not tensor_filter.strict and (unused := _heads(weights, tensor_filter)):
        lines.append(f"dropped: {first_of(unused)}: a head that is not used")
    return lines


def entries_of(model: Sequence[Any]) -> list[ShardedTensor]:
    """Describe this rank's tensors of the chunks `model`; those of layers have names with the layer."""
    return [
        _named_by_layer(entry)
        for chunk in unwrap_model(list(model))
        for entry in chunk.sharded_state_dict().values()
        if isinstance(entry, ShardedTensor)
    ]


def _named_by_layer(entry: ShardedTensor) -> ShardedTensor:
    """Describe a tensor of one layer under a name with its number, not as a part of those of all layers."""
    axes = entry.prepend_axis_num
    if not axes:
        return entry
    return replace(
        entry,
        key=entry.key.replace("encoder.layers.", LAYER.format(n=entry.global_offset[0]), 1),
        global_shape=entry.global_shape[axes:],
        global_offset=entry.global_offset[axes:],
        axis_fragmentations=entry.axis_fragmentations[axes:],
        prepend_axis_num=0,
    )


def _heads(weights: Weights, tensor_filter: TensorFilter) -> list[str]:
    """Return the tensors of heads that stay in the checkpoint."""
    return [
        name
        for name in weights.infos
        if name.startswith((TASK_HEAD, *LM_HEAD)) and tensor_filter.unused(name)
    ]


def _share(value: Tensor, entry: ShardedTensor) -> Tensor:
    """Return the part of a whole tensor that `entry` describes."""
    missing_rows = entry.global_shape[0] - value.shape[0]
    if missing_rows > 0:
        # Only the vocabulary is padded; the padding is zero and takes no part in anything.
        value = torch.cat((value, value.new_zeros(missing_rows, *value.shape[1:])))
    for axis, length in enumerate(entry.local_shape):
        value = value.narrow(axis, entry.global_offset[axis], length)
    return value
