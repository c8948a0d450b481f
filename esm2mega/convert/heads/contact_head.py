"""Converts the regression on attention maps to the ``contact_head`` of published models and back.

Legend: ``L`` layers, ``n`` heads of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.checkpoint.tensor_filter import TASK_HEAD
from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.head_form import ATTENTION_MAPS, head_form
from esm2mega.config.schema import TaskConfig
from esm2mega.convert.lazy_weights import HeadDescription, Weights
from esm2mega.convert.name_table import CONTACT_HEAD
from esm2mega.errors import UserError

WEIGHT, BIAS = f"{CONTACT_HEAD}weight", f"{CONTACT_HEAD}bias"
_WEIGHTS, _BIAS = f"{TASK_HEAD}weights.", f"{TASK_HEAD}bias"


def is_regression(task: TaskConfig) -> bool:
    """Tell whether the head of a task is the regression on attention maps."""
    return task.kind is not None and head_form(task) == ATTENTION_MAPS


def is_contact_head(head: HeadDescription | None) -> bool:
    """Tell whether a trained head computes what the ``contact_head`` of published models does."""
    return head is not None and head.is_configured and is_regression(head.task)


def as_published(read: Callable[[str], Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return a trained head as the tensors ``contact_head``: weight ``[1, L * n]`` and bias ``[1]``.

    Args:
        read: Returns a tensor of the head by its name in the model.
        num_layers: Number of layers, L.
    """
    weight = torch.cat([read(f"{_WEIGHTS}{layer}") for layer in range(num_layers)], dim=1)
    return {WEIGHT: weight, BIAS: read(_BIAS)}


def with_published_head(weights: Weights) -> Weights:
    """Make a trained head the contact head of its encoder, in place of the one that the encoder had.

    Raises:
        UserError: The tensors are not those of `task.head=attention_maps`, as for a user's own head.
    """
    head = weights.description.task
    assert head is not None
    expected = {_BIAS, *(f"{_WEIGHTS}{layer}" for layer in range(weights.description.shape.num_layers))}
    if head.shapes.keys() != expected:
        raise UserError(
            f"{weights.origin.get('path', 'weights')}: its head is {', '.join(sorted(head.shapes))}, not "
            "that of task.head=attention_maps; --drop-head writes the encoder without it"
        )
    if weights.has_contact_head:
        weights.notes.dropped.append(f"{CONTACT_HEAD}*: that of before the training")
    weights.notes.changed.append("head of the task: now the contact head")
    num_layers, read = weights.description.shape.num_layers, weights.read
    infos = {name: info for name, info in weights.infos.items() if name not in head.shapes}
    description = replace(weights.description, head=None)
    for name in (WEIGHT, BIAS):
        infos[name] = TensorInfo(description.shapes[name], description.dtype)
    return replace(
        weights,
        description=description,
        infos=infos,
        read=lambda name: as_published(read, num_layers)[name] if name in (WEIGHT, BIAS) else read(name),
    )


@torch.no_grad()
def fill_head(model: Sequence[Any], published: Mapping[str, Tensor]) -> None:
    """Start the head of a model with a published one, on every pipeline stage.

    Args:
        model: This rank's chunks of the model.
        published: Tensors by name, among them ``contact_head``.
    """
    for chunk in unwrap_model(list(model)):
        # [1, L * n] -> [L, n], layer-major
        weight = published[WEIGHT].view(chunk.config.num_layers, -1)
        for name, parameter in chunk.named_parameters():
            if name.startswith(_WEIGHTS):
                parameter.copy_(weight[int(name.removeprefix(_WEIGHTS))])
            elif name == _BIAS:
                parameter.copy_(published[BIAS])
