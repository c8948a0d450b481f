"""Marks in the model which parameters a run trains, before it is wrapped for data parallelism."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esm2mega.errors import UserError

_LAYER = re.compile(r"encoder\.layers\.\d+\.")


def freeze(chunks: Sequence[Any], trained: Callable[[str], bool]) -> None:
    """Mark as trainable the parameters that `trained` selects, and freeze all others.

    Args:
        chunks: This rank's chunks of `esm2mega.model.esm2.ESM2Model`.
        trained: Takes the name of a parameter in the whole model, and says whether it is trained.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(trained(chunk.global_parameter_name(name)))
    ask_for_gradients(chunks)


def ask_for_gradients(chunks: Sequence[Any]) -> None:
    """Prepare chunks for a backward pass in which the embedding may be frozen."""
    for chunk in chunks:
        config = chunk.config
        # Recomputed layers and pipeline stages run a backward pass only if their input requires a gradient.
        asked = config.recompute_granularity == "full" or config.pipeline_model_parallel_size > 1
        if chunk.pre_process and asked:
            chunk.embedding.register_forward_hook(_want_gradient)


def refuse_split_layers(names: Iterable[str], trained: Callable[[str], bool], what: str) -> None:
    """Refuse weights that are trained in some layers and frozen in others.

    Args:
        names: Names of all parameters in the whole model.
        trained: Says of such a name whether it is trained.
        what: What froze them, for the error, as in ``finetune.freeze=[…]``.

    Raises:
        UserError: There are such weights.
    """
    every = set(names)
    of = {
        answer: {_in_every_layer(name) for name in every if trained(name) == answer}
        for answer in (True, False)
    }
    if split := of[True] & of[False]:
        raise UserError(
            f"{what} freezes {min(split)} in some layers and not in others, which checkpoints cannot hold; "
            "treat all layers alike, by * for the number where names are given, as in encoder.layers.*.mlp.*"
        )


def gathered(names: Iterable[str]) -> list[str]:
    """Gather the names of the whole model from the ranks' own names; all-gather over the world."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, list(names))
    return sorted({name for own in of_ranks for name in own})


def _in_every_layer(name: str) -> str:
    """Put ``*`` for the layer into the name of a weight; a checkpoint holds all layers as one tensor."""
    return _LAYER.sub("encoder.layers.*.", name)


def check_stages(chunks: Sequence[Any], key: str) -> None:
    """Refuse a layout that leaves a process nothing to train, which the distributed optimizer cannot handle.

    All ranks call this together: it is an all-reduce over the world.

    Args:
        chunks: This rank's chunks.
        key: The setting that decides what is trained, as in ``finetune.freeze=[…]``.

    Raises:
        UserError: Some rank has nothing to train; raised on every rank.
    """
    trained = sum(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())
    least = torch.tensor(trained, device=next(chunks[0].parameters()).device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    if not least:
        raise UserError(
            f"{key} leaves a pipeline stage without weights to train, which "
            "parallel.distributed_optimizer=true does not allow; set it to false"
        )


def _want_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()
