"""Finds the first protein of an evaluation for which a model gives values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from esm2mega.batch import PackedBatch
from esm2mega.checkpoint.finite import not_finite, too_large
from esm2mega.convert.start_point import StartPoint
from esm2mega.parallel.errors import on_one_rank
from esm2mega.train.losses import LossReduction, LossTerms, perplexity


class Watched(LossReduction):
    """Wraps a loss of masked language modelling, and notes the first protein whose logits are not finite."""

    def __init__(self, loss: LossReduction) -> None:
        """Wrap `loss`."""
        self.loss = loss
        self.row: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.loss.names

    def forward(self, batch: PackedBatch, output: Tensor) -> LossTerms:
        if self.row is None and not bool(output.isfinite().all()):
            parts = batch.by_protein(output)
            self.row = next((row for row, _, x in parts if not bool(x.isfinite().all())), None)
        return self.loss.terms(batch, output)


def refuse_not_finite(
    rows: Sequence[int] | None, name: Callable[[int], str], output: str, start: StartPoint
) -> None:
    """Refuse the results of a model if some are not finite; all ranks call this together.

    Args:
        rows: On the main process the proteins that the ranks noted, see `esm2mega.train.evaluate.gathered`.
        name: Returns the id of a protein.
        output: Name of what is not finite.
        start: The model.

    Raises:
        UserError: A rank noted a protein; it is raised on all ranks.
    """

    def check() -> None:
        if rows:
            raise not_finite(name(min(rows)), output, start.path)

    on_one_rank(check)


def refuse_large(loss: float | None, name: str, start: StartPoint) -> None:
    """Raise `UserError` if a mean loss of language modelling has no finite perplexity.

    Args:
        loss: In nats per residue, the same on every rank; None where nothing was to be predicted.
        name: Name of the data.
        start: The model.
    """
    if loss is not None and not math.isfinite(perplexity(loss)):
        raise too_large(name, f"a loss of {loss:.3g} nats has no finite perplexity", start.path)
