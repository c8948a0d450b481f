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

OPTIMIZER = "optimizer."
"""The names of the tensors of the optimizer begin with this prefix; all others are weights."""

TASK_HEAD = "head."
"""The names of the weights of a task's head begin with this prefix."""

LM_HEAD = ("lm_head.", "output_layer.")
"""The names of the weights of the masked language model's head begin with one of these prefixes."""


@dataclass(frozen=True)
class TensorFilter:
    """Chooses tensors of a checkpoint and a model by their names in the whole model and by their properties.

    Attributes:
        excluded: Tensors of the model that stay as they are and are not saved; all others must be in the
            checkpoint.
        unused: Tensors of the checkpoint that may have no place in the model; any other without a place is an
            error.
        strict: If false, tensors that are missing, have another shape or no place are reported, not refused.
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
"""Loads the encoder alone; the head of the model is not used or comes from elsewhere, and stays as it is."""

TRAINED = TensorFilter(lambda name, tensor: not tensor.requires_grad, _none)
"""Loads or saves the tensors that are trained, for checkpoints without the frozen weights under them."""

TRAINED_ENCODER = TensorFilter(TRAINED.excluded, _is_head)
"""Loads what `TRAINED` does into a model that does not have the head of the checkpoint."""


def for_task(config: FinetuneConfig) -> TensorFilter:
    """Return the filter for a task: the encoder, and the head if `load_head` is set, both without `skip`."""
    chosen = TensorFilter(_none, lambda name: name.startswith(LM_HEAD)) if config.load_head else ENCODER
    skipped = tuple(config.skip)
    return TensorFilter(
        lambda name, tensor: name.startswith(skipped) or chosen.excluded(name, tensor),
        lambda name: name.startswith(skipped) or chosen.unused(name),
        config.strict,
    )


@dataclass(frozen=True)
class LoadReport:
    """Reports how the tensors of a checkpoint and of a model differ; it is the same on every rank.

    Attributes:
        missing: Tensors of the model that the checkpoint lacks.
        shape_mismatch: Tensors of the model that have another shape in the checkpoint: the shape in the
            checkpoint and the shape in the model.
        unexpected: Tensors of the checkpoint that have no place in the model.
    """

    missing: Sequence[str]
    shape_mismatch: Mapping[str, tuple[Shape, Shape]]
    unexpected: Sequence[str]

    def lines(self, reasons: Mapping[str, str] | None = None) -> list[str]:
        """Return all differences, a line each.

        Args:
            reasons: Why tensors are missing, by name, in words; those of no other reason are not there.
        """
        known = reasons or {}
        return [
            *(
                f"initial: {name}: {known[name]}" if name in known else f"initial: {name} is not there"
                for name in self.missing
            ),
            *(
                f"initial: {name} is {list(there)} there and {list(here)} here"
                for name, (there, here) in self.shape_mismatch.items()
            ),
            *(f"dropped: {name} has no place in this model" for name in self.unexpected),
        ]

    def narrowed(self, tensor_filter: TensorFilter) -> TensorFilter:
        """Narrow `tensor_filter` to the tensors that fit."""
        unfit = {*self.missing, *self.shape_mismatch}
        return replace(
            tensor_filter,
            excluded=lambda name, tensor: name in unfit or tensor_filter.excluded(name, tensor),
            unused=lambda name: True,
        )


def compare_tensors(
    entries: Sequence[Any], shapes: Mapping[str, Shape], tensor_filter: TensorFilter, location: str
) -> LoadReport:
    """Compare the tensors of a model with those of a checkpoint, in an all-gather over the world.

    Args:
        entries: Megatron-Core's descriptions of the tensors of this rank that shall be loaded.
        shapes: Shapes of the checkpoint's tensors; layers are stacked along axis 0.
        tensor_filter: Says which tensors of the checkpoint may have no place in the model.
        location: The checkpoint, named in errors.

    Raises:
        UserError: No tensor fits.
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
    """Return the shape of a whole tensor; a checkpoint's vocabulary may have other padding."""
    here = tuple(entry.global_shape)
    same_but_rows = there is not None and len(there) == len(here) and there[1:] == here[1:]
    return there if entry.allow_shape_mismatch and same_but_rows and there is not None else here
