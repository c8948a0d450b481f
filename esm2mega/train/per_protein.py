"""Keeps the loss of each protein of an evaluation, as a sum and a number of labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esm2mega.parallel.initialize import Ranks
from esm2mega.train.evaluate import gathered
from esm2mega.train.losses import LossReduction, LossTerms

Split = Callable[[Any, Tensor], Iterator[tuple[int, Any, Tensor]]]
"""Splits a batch and an output by proteins: the row of each, its part of the batch, and of the output."""


@dataclass(frozen=True)
class ProteinLosses:
    """Holds the loss of each of n proteins; their totals give the mean of the split.

    Attributes:
        sums: Sum of the loss over the labels of each protein, fp64 ``[n]``.
        counts: Number of these labels, int64 ``[n]``.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


class PerProtein(LossReduction):
    """Wraps a loss, and keeps the terms of each protein that it sees; the pieces of a protein are added."""

    def __init__(self, loss: LossReduction, split: Split) -> None:
        """Make the wrapper.

        Args:
            loss: The loss, a sum over labels.
            split: Splits a micro-batch, such as `PackedBatch.by_protein`.
        """
        self.loss, self._split = loss, split
        self._rows: list[int] = []
        self._terms: list[Tensor] = []  # [proteins, 2] each: sum, count

    @property
    def names(self) -> tuple[str, ...]:
        return self.loss.names

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        terms = []
        for row, part, values in self._split(batch, output):
            found = self.loss.terms(part, values)
            self._rows.append(row)
            terms.append(torch.stack([found.loss_sum.double(), found.count.double()]))
        if terms:
            self._terms.append(torch.stack(terms).cpu())
        return self.loss.terms(batch, output)

    def gather(self, num_proteins: int, ranks: Ranks) -> ProteinLosses | None:
        """Gather the terms of all ranks on the main process, None on others; all ranks call this together.

        Args:
            num_proteins: Number n of proteins of the split.
            ranks: Where this process stands.
        """
        mine = (np.array(self._rows), torch.cat(self._terms).numpy()) if self._terms else None
        parts = gathered(mine, ranks)
        if parts is None:
            return None
        totals = np.zeros((num_proteins, 2))
        for rows, terms in parts:
            np.add.at(totals, rows, terms)
        return ProteinLosses(totals[:, 0].copy(), totals[:, 1].astype(np.int64))
