"""Counts values that are not finite (NaN and infinity) in weights, and phrases their errors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from esm2mega.errors import UserError

_MOST_NAMED = 3


class FiniteCheck:
    """Counts the values that are not finite, tensor by tensor; a tensor that is added again counts once."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._found: dict[str, tuple[int, int]] = {}  # number of NaNs and of infinities

    def add(self, name: str, value: Tensor) -> Tensor:
        """Look at a tensor, and return it."""
        self._sizes[name] = value.numel()
        if value.is_floating_point():
            # Not all functions have kernels for 8 bits.
            wide = value.float() if value.element_size() == 1 else value
            if not bool(torch.isfinite(wide).all()):
                self._found[name] = int(wide.isnan().sum()), int(wide.isinf().sum())
        return value

    def __bool__(self) -> bool:
        """Return whether any value is not finite."""
        return bool(self._found)

    @property
    def names(self) -> list[str]:
        """Return the names of the tensors with such values, in the order in which they were added."""
        return list(self._found)

    def words(self) -> str:
        """Say how many values of how many tensors are not finite, and name the first of these tensors."""
        if not self._found:
            return f"all {sum(self._sizes.values()):,} values of {len(self._sizes):,} tensors are finite"
        total = sum(nans + infinities for nans, infinities in self._found.values())
        first = ", ".join(
            f"{name} ({nans:,} NaN, {infinities:,} infinite, of {self._sizes[name]:,})"
            for name, (nans, infinities) in list(self._found.items())[:_MOST_NAMED]
        )
        rest = f", and {len(self._found) - _MOST_NAMED:,} more" if len(self._found) > _MOST_NAMED else ""
        return (
            f"{total:,} values in {len(self._found):,} of {len(self._sizes):,} tensors are not finite: "
            f"{first}{rest}"
        )


def not_finite(protein: str, output: str, checkpoint: str | Path) -> UserError:
    """Return the error for a result that is not finite; nothing of it must be written.

    Args:
        protein: Name of the first protein that has such a value.
        output: Name of the output in which it is.
        checkpoint: The model.
    """
    return UserError(
        f"{protein}: {output} has values that are not finite (NaN or infinity), which are not written; "
        f"`esm2mega inspect {checkpoint}` counts and names the weights that are damaged or diverged"
    )


def too_large(name: str, what: str, checkpoint: str | Path) -> UserError:
    """Return the error for a loss that is too large for what is computed from finite outputs.

    Args:
        name: Name of the data or of the protein.
        what: Says what is too large.
        checkpoint: The model.
    """
    return UserError(
        f"{name}: {what}, so nothing is written; the weights of {checkpoint} are damaged or diverged: use an "
        "earlier checkpoint"
    )
