"""Which weights of a fine-tuned model are trained: the one place that decides it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from esm2mega.checkpoint.choice import TASK_HEAD
from esm2mega.config.schema import FinetuneConfig
from esm2mega.errors import UserError

_LAYER = re.compile(r"encoder\.layers\.\d+\.")


def set_trainable(chunks: Sequence[Any], config: FinetuneConfig, distributed_optimizer: bool = False) -> str:
    """Freeze what `config` says, before the chunks are wrapped; all ranks call this together.

    Args:
        chunks: This rank's chunks with their initial weights.
        config: Mode and patterns.
        distributed_optimizer: Whether every process needs weights to train.

    Returns:
        What is trained, in words.

    Raises:
        UserError: A pattern that matches no weight, or nothing is left to train.
    """
    named = [
        (chunk.global_parameter_name(name), parameter)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    ]
    matched = set()
    trained: dict[str, int] = {}
    for name, parameter in named:
        patterns = [pattern for pattern in config.freeze if fnmatch.fnmatchcase(name, pattern)]
        matched.update(patterns)
        if patterns or (config.mode == "frozen" and not name.startswith(TASK_HEAD)):
            parameter.requires_grad = False
        else:
            trained[name] = parameter.numel()
    for chunk in chunks:
        chunk.frozen = config.mode == "frozen"
    # Every stage knows its own weights; all of them agree on what is wrong.
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (matched, sorted(trained), sorted(name for name, _ in named)))
    found = set().union(*(patterns for patterns, _, _ in seen))
    trained_names = set().union(*(names for _, names, _ in seen))
    names = set().union(*(all_names for _, _, all_names in seen))
    split = {_in_every_layer(name) for name in trained_names} & {
        _in_every_layer(name) for name in names - trained_names
    }
    if split:
        raise UserError(
            f"finetune.freeze={config.freeze} freezes {min(split)} in some layers and not in others, which "
            "checkpoints cannot hold; name layers by *, as in encoder.layers.*.mlp.*"
        )
    for pattern in config.freeze:
        if pattern not in found:
            shown = ", ".join(sorted(names)[:3])
            raise UserError(f"finetune.freeze: {pattern!r} matches no weight; names are such as {shown}")
    if not trained_names:
        raise UserError(f"finetune.freeze={config.freeze} freezes every weight; leave some to train")
    if distributed_optimizer and not all(names for _, names, _ in seen):
        raise UserError(
            f"finetune.freeze={config.freeze} leaves a pipeline stage without weights to train, which "
            "parallel.distributed_optimizer=true does not allow; set it to false"
        )
    return f"{len(trained_names)} of {len(names)} tensors are trained (finetune.mode={config.mode})"


def _in_every_layer(name: str) -> str:
    """The name of a weight with ``*`` for its layer; a checkpoint holds all layers as one tensor."""
    return _LAYER.sub("encoder.layers.*.", name)
