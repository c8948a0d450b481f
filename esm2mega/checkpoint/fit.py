"""What of a checkpoint fits a model of another make, for a start that takes what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from esm2mega.checkpoint.choice import TensorChoice
from esm2mega.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """How the tensors of a checkpoint and those of a model differ, the same on every rank.

    Attributes:
        missing: Tensors of the model that the checkpoint lacks.
        misshapen: Those that have another shape there: the shape there, and here.
        unexpected: Tensors of the checkpoint that have no place.
    """

    missing: Sequence[str]
    misshapen: Mapping[str, tuple[Shape, Shape]]
    unexpected: Sequence[str]

    def lines(self) -> list[str]:
        """All differences, a line each."""
        return [
            *(f"initial: {name} is not there" for name in self.missing),
            *(
                f"initial: {name} is {list(there)} there and {list(here)} here"
                for name, (there, here) in self.misshapen.items()
            ),
            *(f"dropped: {name} has no place in this model" for name in self.unexpected),
        ]

    def narrowed(self, choice: TensorChoice) -> TensorChoice:
        """`choice` without what does not fit."""
        unfit = {*self.missing, *self.misshapen}
        return replace(
            choice,
            kept=lambda name, tensor: name in unfit or choice.kept(name, tensor),
            unused=lambda name: True,
        )


def find_fit(entries: Sequence[Any], shapes: Mapping[str, Shape], choice: TensorChoice, place: str) -> Fit:
    """Compare the tensors of a model with those of a checkpoint. All-gather over the world.

    Args:
        entries: Megatron-Core's description of the tensors of this rank that are wanted.
        shapes: Of the tensors of the checkpoint, those of all layers stacked along axis 0.
        choice: Says which of these may have no place.
        place: The checkpoint, for errors.

    Raises:
        UserError: Nothing fits.
    """
    mine = {entry.key: _shape_here(entry, shapes.get(entry.key)) for entry in entries}
    of_ranks: list[dict[str, Shape]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    wanted = {name: shape for part in of_ranks for name, shape in part.items()}
    fit = Fit(
        sorted(wanted.keys() - shapes.keys()),
        {
            name: (shapes[name], shape)
            for name, shape in sorted(wanted.items())
            if name in shapes and shapes[name] != shape
        },
        sorted(name for name in shapes.keys() - wanted.keys() if not choice.unused(name)),
    )
    if len(fit.missing) + len(fit.misshapen) == len(wanted):
        raise UserError(f"{place}: none of its tensors fits this model; give another init_from")
    return fit


def _shape_here(entry: Any, there: Shape | None) -> Shape:
    """The shape of a whole tensor; the vocabulary of a checkpoint may be padded to another height."""
    here = tuple(entry.global_shape)
    same_but_rows = there is not None and len(there) == len(here) and there[1:] == here[1:]
    return there if entry.allow_shape_mismatch and same_but_rows and there is not None else here
