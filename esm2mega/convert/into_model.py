"""Weights of any format straight into the model that this rank holds, at any parallel layout."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.auxiliary import read_auxiliary
from esm2mega.checkpoint.store import load_weights
from esm2mega.checkpoint.tensor_filter import ALL, ENCODER, TensorFilter, compare_tensors, for_task
from esm2mega.config.load import load_run, load_run_over, value_of
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ModelConfig, Run
from esm2mega.convert.formats.esm2mega import is_auxiliary, run_of, stacked_name
from esm2mega.convert.formats.registry import detect, open_weights
from esm2mega.convert.heads.contact_head import WEIGHT, fill_head, is_regression
from esm2mega.convert.lazy_weights import HeadDescription, Weights
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError


def load_initial_weights(
    path: Path, config: ModelConfig, model: Sequence[Any], choice: TensorFilter = ALL
) -> dict[str, Tensor]:
    """Fill the model from a checkpoint in any format; every rank calls this and reads what it needs. What is
    not carried over as it is gets a line on rank 0.

    Args:
        path: What `init_from` names.
        config: The model's section of the configuration, which must be that of the checkpoint.
        model: This rank's chunks.
        choice: Which tensors are taken.

    Returns:
        Auxiliary tensors of the checkpoint.

    Raises:
        UserError: Not readable, or a model of another shape or with other numerics.
    """
    if not path.exists() or detect(path) == "esm2mega":
        checkpoint = layout.resolve_checkpoint(path)
        found = layout.read_config(checkpoint).model
        check_same_model(f"init_from={path}", found, config, "give another init_from")
        _say(load_weights(checkpoint, model, choice))
        return read_auxiliary(checkpoint)
    weights = open_weights(path)
    _say(weights.notes.lines())
    found, description = ModelConfig(), weights.description
    for key, value in description.shape._asdict().items():
        setattr(found, key, value)
    for key in _NUMERICS:
        setattr(found, key, getattr(description, key))
    check_same_model(f"init_from={path}", found, config, "give another init_from")
    _say(fill_model(weights, model, choice))
    kept = is_auxiliary(description)
    return {name: weights.read(name).clone() for name in weights.infos if kept(name)}


def load_for_task(path: Path, run: Run, model: Sequence[Any]) -> dict[str, Tensor]:
    """`load_initial_weights` of a model with the head of a task; that starts as `finetune.load_head` says,
    which may mean the contact head of a pretrained model.
    """
    if not starts_with_contact_head(path, run):
        auxiliary = load_initial_weights(path, run.model, model, for_task(run.finetune))
        if is_regression(run.task) and not run.finetune.load_head and WEIGHT in auxiliary:
            _say(["contact head: not the start, which is zero; finetune.load_head=true starts with it"])
        return auxiliary
    choice = replace(ENCODER, strict=run.finetune.strict)
    auxiliary = load_initial_weights(path, run.model, model, choice)
    fill_head(model, auxiliary)
    _say(["contact head: the start of the head"])
    return auxiliary


def starts_with_contact_head(path: Path, run: Run) -> bool:
    """Whether the head of the task is to be the contact head of a model without a task.

    Raises:
        UserError: That model has none.
    """
    if not run.finetune.load_head or not is_regression(run.task):
        return False
    if isinstance(head_at(path), HeadDescription):
        return False
    if detect(path) == "esm2mega":
        found = WEIGHT in read_auxiliary(layout.resolve_checkpoint(path))
    else:
        found = open_weights(path).has_contact_head
    if not found:
        raise UserError(f"init_from={path}: has no contact head; set finetune.load_head=false")
    return True


def head_at(path: Path) -> Literal["lm"] | HeadDescription | None:
    """Which head a checkpoint in any format has, see `Description`."""
    if detect(path) != "esm2mega":
        return open_weights(path).description.head
    checkpoint = layout.resolve_checkpoint(path)
    # Adapters have no tensors of their base, so the checkpoint may not be readable as a whole model.
    task = layout.read_config(checkpoint).task
    if task.kind is None:
        return "lm"
    return HeadDescription(task, TargetInfo.from_dict(layout.read_state(checkpoint)["task"]), {})


def load_run_with_model(config: str | None, overrides: Sequence[str] = ()) -> Run:
    """`load_run`, with the model of `init_from` unless another one is configured.

    Args:
        config: Path or name of a configuration.
        overrides: ``key=value`` over it.

    Raises:
        UserError: As `load_run`; or `init_from` cannot be read.
    """
    init_from = value_of("init_from", config, overrides)
    if not isinstance(init_from, str) or not Path(init_from).exists():
        shape = [value_of(f"model.{key}", config, overrides) for key in ("size", "num_layers")]
        if isinstance(init_from, str) and shape == [None, None]:
            raise UserError(f"init_from={init_from} does not exist, and no model is configured; correct it")
        return load_run(config, overrides)
    if detect(Path(init_from)) == "esm2mega":
        model = layout.read_config(layout.resolve_checkpoint(init_from)).model
    else:
        model = run_of(open_weights(Path(init_from)).description).model
    # How it was computed says nothing about this machine.
    defaults = ModelConfig()
    for key in ("layer_spec", "attention_backend", "recompute"):
        setattr(model, key, getattr(defaults, key))
    return load_run_over(Run(model=model), overrides, config)


_NUMERICS = ("family", "layernorm_epsilon", "activation", "final_layernorm", "max_positions")
"""Keys of the model that no shape of a shared tensor shows, but its numbers."""


def check_same_model(location: str, found: ModelConfig, configured: ModelConfig, cure: str) -> None:
    """Refuse what no training could make up for: another shape, or weights that mean something else.

    Args:
        location: Where the weights are, for the message.
        found: The model they belong to.
        configured: The model of the configuration.
        cure: What to do about another shape.
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
    """What is not carried over as it is, on rank 0."""
    if lines and os.environ.get("RANK", "0") == "0":
        print("\n".join(f"init_from {line}" for line in lines), file=sys.stderr)


@torch.no_grad()
def fill_model(weights: Weights, model: Sequence[Any], choice: TensorFilter = ALL) -> list[str]:
    """Copy this rank's share of every tensor of `choice` into the chunks `model`, in place.

    Returns:
        What was not copied, a line each; empty unless `choice` is lenient.

    Raises:
        UserError: A tensor is not there, or has another shape.
    """
    entries = [
        entry
        for chunk in unwrap_model(list(model))
        for entry in chunk.sharded_state_dict().values()
        if isinstance(entry, ShardedTensor) and not choice.excluded(entry.key, entry.data)
    ]
    shapes = {}
    for name, info in weights.infos.items():
        stacked, layer = stacked_name(name)
        layers = () if layer is None else (weights.description.shape.num_layers,)
        shapes[stacked] = (*layers, *info.shape)
    location = weights.origin.get("path", "weights")
    # What has no place in the model has been reported, or stays with it as auxiliary.
    fit = compare_tensors(entries, shapes, replace(choice, unused=lambda name: True), location)
    if choice.strict and fit.lines():
        raise UserError(
            f"{location}: {fit.lines()[0]}; set finetune.load_head=false or finetune.strict=false, or give "
            "another init_from"
        )
    narrowed = fit.narrowed(choice)
    for entry in entries:
        if not narrowed.excluded(entry.key, entry.data):
            entry.data.copy_(_share(weights, entry))
    return fit.lines()


def _share(weights: Weights, entry: ShardedTensor) -> Tensor:
    """The part of a whole tensor that `entry` describes."""
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
