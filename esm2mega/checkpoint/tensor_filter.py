"""Decides which tensors pass between a checkpoint and a model, and reports what did not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from esm2mega.config.schema import FinetuneConfig
from esm2mega.errors import UserError

Shape = tuple[int, ...]

TASK_HEAD = "head."
"""Names of the weights of a task's head begin so."""

LM_HEAD = ("lm_head.", "output_layer.")
"""Those of the head of the masked language model."""


@dataclass(frozen=True)
class TensorFilter:
    """Chooses tensors by their names in the whole model, or among the tensors of this rank.

    Attributes:
        excluded: Tensors of the model that stay as they are and are not saved; all others must be in the
            checkpoint.
        unused: Tensors of the checkpoint that have no place; any other one without a place is an error.
        strict: False: what is missing, of another shape, or without a place is reported, not refused.
    """

    excluded: Callable[[str, Tensor], bool]
    unused: Callable[[str], bool]
    strict: bool = True


def _none(*_: object) -> bool:
    return False


def _is_head(name: str, *_: object) -> bool:
    return name.startswith((*LM_HEAD, TASK_HEAD))


ALL = TensorFilter(_none, _none)

ENCODER = TensorFilter(_is_head, _is_head)
"""For a model whose head is not used, or comes from somewhere else: it stays as it is."""

TRAINED = TensorFilter(lambda name, tensor: not tensor.requires_grad, _none)
"""Of a checkpoint that holds what was trained, and not the weights under it."""

TRAINED_ENCODER = TensorFilter(TRAINED.excluded, _is_head)
"""The same for a model that has not the head of the checkpoint."""


def for_task(config: FinetuneConfig) -> TensorFilter:
    """For a model with the head of a task: the encoder, and the head if it is wanted too."""
    if config.load_head:
        return TensorFilter(_none, lambda name: name.startswith(LM_HEAD), config.strict)
    return replace(ENCODER, strict=config.strict)


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a checkpoint and those of a model differ, the same on every rank.

    Attributes:
        missing: Tensors of the model that the checkpoint lacks.
        shape_mismatch: Those that have another shape there: the shape there, and here.
        unexpected: Tensors of the checkpoint that have no place.
    """

    missing: Sequence[str]
    shape_mismatch: Mapping[str, tuple[Shape, Shape]]
    unexpected: Sequence[str]

    def lines(self) -> list[str]:
        """All differences, a line each."""
        return [
            *(f"initial: {name} is not there" for name in self.missing),
            *(
                f"initial: {name} is {list(there)} there and {list(here)} here"
                for name, (there, here) in self.shape_mismatch.items()
            ),
            *(f"dropped: {name} has no place in this model" for name in self.unexpected),
        ]

    def narrowed(self, tensor_filter: TensorFilter) -> TensorFilter:
        """Narrow `tensor_filter` to what fits."""
        unfit = {*self.missing, *self.shape_mismatch}
        return replace(
            tensor_filter,
            excluded=lambda name, tensor: name in unfit or tensor_filter.excluded(name, tensor),
            unused=lambda name: True,
        )


def compare_tensors(
    entries: Sequence[Any], shapes: Mapping[str, Shape], tensor_filter: TensorFilter, location: str
) -> LoadReport:
    """Compare the tensors of a model with those of a checkpoint. All-gather over the world.

    Args:
        entries: Megatron-Core's description of the tensors of this rank that are wanted.
        shapes: Of the tensors of the checkpoint, those of all layers stacked along axis 0.
        tensor_filter: Says which of these may have no place.
        location: The checkpoint, for errors.

    Raises:
        UserError: Nothing fits.
    """
    mine = {entry.key: _shape_here(entry, shapes.get(entry.key)) for entry in entries}
    of_ranks: list[dict[str, Shape]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    shapes_here = {name: shape for part in of_ranks for name, shape in part.items()}
    report = LoadReport(
        sorted(shapes_here.keys() - shapes.keys()),
        {
            name: (shapes[name], shape)
            for name, shape in sorted(shapes_here.items())
            if name in shapes and shapes[name] != shape
        },
        sorted(name for name in shapes.keys() - shapes_here.keys() if not tensor_filter.unused(name)),
    )
    if len(report.missing) + len(report.shape_mismatch) == len(shapes_here):
        raise UserError(f"{location}: none of its tensors fits this model; give another init_from")
    return report


def _shape_here(entry: Any, there: Shape | None) -> Shape:
    """The shape of a whole tensor; the vocabulary of a checkpoint may be padded to another height."""
    here = tuple(entry.global_shape)
    same_but_rows = there is not None and len(there) == len(here) and there[1:] == here[1:]
    return there if entry.allow_shape_mismatch and same_but_rows and there is not None else here
