"""Defines a loss that returns a mean over the micro-batch, which is made a sum so that layouts agree."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esm2mega.data.labels.schema import IGNORED
from esm2mega.errors import UserError
from esm2mega.finetune.losses import TaskLossReduction
from esm2mega.train import users_code
from esm2mega.train.losses import LossTerms, Means, checked_terms

_AVG = "avg"
"""This entry of the dictionary that `LossReduction.forward` returns is the loss; others are logged."""


class LossReduction(TaskLossReduction):
    """Serves as base class of losses that compare labels and outputs of a micro-batch; write `forward`.

    A mean over a micro-batch depends on which proteins share it, and a mean of means on how many layouts
    have. So a mean is multiplied by its number of labels, and the sums of all micro-batches and processes are
    divided by the global number. Micro-batches without labels are left out.
    """

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], forward_out: Tensor) -> Any:
        """Compute the loss of one micro-batch.

        Args:
            batch: ``labels``, in the units of the data: of numbers ``[n, k]`` in the dtype of `forward_out`,
                NaN where there is none; of classes ``[n]``, -100 where there is none; of residues ``[R, m]``.
                ``loss_mask`` has the same shape, and is true where there is a label.
            forward_out: What the head returned, ``[n, k]`` or ``[R, k]``, in fp32 at least.

        Returns:
            ``(loss, {"avg": loss})`` with the mean over the labels; or ``(sum, count)``, the sum and a number
            by which the sums of all micro-batches are divided. Further means in the dictionary, under the
            names in `names`, are logged beside the loss.
        """

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """Return the loss to log; gradients do not depend on it.

        Args:
            losses_reduced_per_micro_batch: One dictionary, with the means over all micro-batches and
                processes, so that the result is the same at every layout.
        """
        return torch.stack([losses[_AVG] for losses in losses_reduced_per_micro_batch]).mean()

    def terms(self, batch: Any, output: Tensor) -> LossTerms:
        """Call `forward`, and make sums of what it returns.

        Raises:
            UserError: It failed, or returned something else than it should.
        """
        values = output.to(torch.promote_types(output.dtype, torch.float32))
        labels = batch.labels
        there = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
        count = there.sum()
        others = [name for name in self.names if name != "loss"]
        if not count:
            # The mean of nothing is NaN; a sum of nothing has a gradient of zero.
            nothing = values.sum() * 0.0
            return LossTerms(nothing, count, {name: (nothing.detach(), count) for name in others})
        given = {"labels": labels.to(values.dtype) if labels.is_floating_point() else labels}
        name = f"{type(self).__name__}.forward"
        returned = users_code.call(name, self.forward, {**given, "loss_mask": there}, values)
        return checked_terms(self, self._sums(name, returned, count), output)

    def _sums(self, name: str, returned: Any, count: Tensor) -> LossTerms:
        """Return what `forward` returned as sums; `count` is the number of labels of the micro-batch."""
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise _other(name, f"a {type(returned).__name__}")
        loss, beside = returned
        if not isinstance(loss, Tensor) or loss.dim():
            shown = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise _other(name, f"a loss of {shown}, which is no single number")
        if not isinstance(beside, dict):
            return LossTerms(loss, beside)
        if _AVG not in beside:
            raise _other(name, f"a dictionary of {', '.join(map(repr, beside)) or 'nothing'}")
        means = {key: torch.as_tensor(value) for key, value in beside.items() if key != _AVG}
        return LossTerms(loss * count, count, {key: (mean * count, count) for key, mean in means.items()})

    def means_of(self, totals: Sequence[Sequence[float]]) -> Means:
        found = super().means_of(totals)
        if found["loss"] is None:
            return found
        named = {_AVG: found["loss"]} | {name: found[name] for name in self.names if name != "loss"}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}
        name = f"{type(self).__name__}.reduce"
        reduced = users_code.call(name, self.reduce, [tensors])
        try:
            return {**found, "loss": float(reduced)}
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"{name} returned {type(reduced).__name__}; return a number, the loss to log"
            ) from None


def _other(name: str, found: str) -> UserError:
    return UserError(
        f'{name} returned {found}; return (loss, {{"avg": loss}}), the mean over the labels of the '
        "micro-batch, or (sum, count)"
    )
