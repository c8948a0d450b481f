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
from esm2mega.checkpoint.tensor_filter import ALL, ENCODER, TensorFilter, compare_tensors, for_task
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ModelConfig, Run
from esm2mega.convert.files.distributed_writer import stacked_name
from esm2mega.convert.heads.contact_head import WEIGHT, fill_head, is_regression
from esm2mega.convert.lazy_weights import Weights
from esm2mega.convert.start_point import StartPoint, starts_with_contact_head
from esm2mega.errors import UserError


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
    if not starts_with_contact_head(start, run.task, run.finetune):
        auxiliary = load_initial_weights(start, run.model, model, for_task(run.finetune))
        if is_regression(run.task) and not run.finetune.load_head and WEIGHT in auxiliary:
            _say(["contact head: not the start, which is zero; finetune.load_head=true starts with it"])
        return auxiliary
    tensor_filter = replace(ENCODER, strict=run.finetune.strict)
    auxiliary = load_initial_weights(start, run.model, model, tensor_filter)
    fill_head(model, auxiliary)
    _say(["contact head: the start of the head"])
    return auxiliary


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
    entries = [
        entry
        for chunk in unwrap_model(list(model))
        for entry in chunk.sharded_state_dict().values()
        if isinstance(entry, ShardedTensor) and not tensor_filter.excluded(entry.key, entry.data)
    ]
    shapes = {}
    for name, info in weights.infos.items():
        stacked, layer = stacked_name(name)
        layers = () if layer is None else (weights.description.shape.num_layers,)
        shapes[stacked] = (*layers, *info.shape)
    location = weights.origin.get("path", "weights")
    # Tensors without a place in the model have been reported, or are kept beside it as auxiliary tensors.
    report = compare_tensors(entries, shapes, replace(tensor_filter, unused=lambda name: True), location)
    if tensor_filter.strict and report.lines():
        raise UserError(
            f"{location}: {report.lines()[0]}; set finetune.load_head=false or finetune.strict=false, "
            "or give another init_from"
        )
    narrowed = report.narrowed(tensor_filter)
    for entry in entries:
        if not narrowed.excluded(entry.key, entry.data):
            entry.data.copy_(_share(weights, entry))
    return report.lines()


def _share(weights: Weights, entry: ShardedTensor) -> Tensor:
    """Return the part of a whole tensor that `entry` describes."""
    axes = entry.prepend_axis_num
    name = entry.key
    if axes:
        name = name.replace("encoder.layers.", f"encoder.layers.{entry.global_offset[0]}.", 1)
    value = weights.read(name)
    missing_rows = entry.global_shape[axes] - value.shape[0]
    if missing_rows > 0:
        # Only the vocabulary is padded; the padding is zero and takes no part in anything.
        value = torch.cat((value, value.new_zeros(missing_rows, *value.shape[1:])))
    for axis, length in enumerate(entry.local_shape):
        value = value.narrow(axis, entry.global_offset[axes + axis], length)
    return value
