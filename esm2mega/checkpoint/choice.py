"""Which tensors pass between a checkpoint and a model: all, the trained ones, or those for another head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from esm2mega.config.schema import FinetuneConfig

TASK_HEAD = "head."
"""Names of the weights of a task's head begin so."""

LM_HEAD = ("lm_head.", "output_layer.")
"""Those of the head of the masked language model."""


@dataclass(frozen=True)
class TensorChoice:
    """A choice by the names of tensors in the whole model, and by the tensors of this rank.

    Attributes:
        kept: Tensors of the model that stay as they are and are not saved; all others must be in the
            checkpoint.
        unused: Tensors of the checkpoint that have no place; any other one without a place is an error.
        strict: False: what is missing, of another shape, or without a place is reported, not refused.
    """

    kept: Callable[[str, Tensor], bool]
    unused: Callable[[str], bool]
    strict: bool = True


def _none(*_: object) -> bool:
    return False


def _is_head(name: str, *_: object) -> bool:
    return name.startswith((*LM_HEAD, TASK_HEAD))


ALL = TensorChoice(_none, _none)

ENCODER = TensorChoice(_is_head, _is_head)
"""For a model whose head is not used, or comes from somewhere else: it stays as it is."""

TRAINED = TensorChoice(lambda name, tensor: not tensor.requires_grad, _none)
"""Of a checkpoint that holds what was trained, and not the weights under it."""

TRAINED_ENCODER = TensorChoice(TRAINED.kept, _is_head)
"""The same for a model that has not the head of the checkpoint."""


def for_task(config: FinetuneConfig) -> TensorChoice:
    """For a model with the head of a task: the encoder, and the head if it is wanted too."""
    if config.load_head:
        return TensorChoice(_none, lambda name: name.startswith(LM_HEAD), config.strict)
    return replace(ENCODER, strict=config.strict)
