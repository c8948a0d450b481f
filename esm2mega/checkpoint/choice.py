"""Which tensors pass from a checkpoint into a model: all, or what a model with another head can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TASK_HEAD = "head."
"""Names of the weights of a task's head begin so."""

LM_HEAD = ("lm_head.", "output_layer.")
"""Those of the head of the masked language model."""


@dataclass(frozen=True)
class TensorChoice:
    """A choice by the names of tensors in the whole model.

    Attributes:
        kept: Tensors of the model that stay as they are; all others must be in the checkpoint.
        unused: Tensors of the checkpoint that have no place; any other one without a place is an error.
    """

    kept: Callable[[str], bool]
    unused: Callable[[str], bool]


ALL = TensorChoice(lambda name: False, lambda name: False)


def for_task(load_head: bool) -> TensorChoice:
    """For a model with the head of a task: the encoder, and the head if it is wanted too."""
    if load_head:
        return TensorChoice(lambda name: False, lambda name: name.startswith(LM_HEAD))
    return TensorChoice(
        lambda name: name.startswith(TASK_HEAD), lambda name: name.startswith((*LM_HEAD, TASK_HEAD))
    )
