"""Computes losses as sums and counts, and reduces them to a global sum divided by a global count.

A mean of means would weight a micro-batch with three labels like one with six hundred. Here each micro-batch
gives a sum and a count, gradients are summed over micro-batches and data-parallel ranks, and one division by
the global count follows. The result then does not depend on how the labels were distributed, and a
micro-batch without labels contributes 0. Where there is no label at all, there is no mean: None, never 0.

Legend: ``m`` labelled tokens of a micro-batch, ``v`` vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.errors import UserError
from esm2mega.train import users_code


@dataclass(frozen=True)
class LossTerms:
    """Holds what one micro-batch contributes to the loss.

    Attributes:
        loss_sum: Sum of the loss over the labels, not their mean, ``[]``, differentiable.
        count: Number of labels in the sum, an integer ``[]``.
        logged: Further quantities to report as global means: name -> (sum, count), each ``[]``.
    """

    loss_sum: Tensor
    count: Tensor
    logged: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


Means = dict[str, float | None]
"""Maps names to global means; one over no labels is None, as there was nothing to predict."""


@overload
def perplexity(loss: float) -> float: ...
@overload
def perplexity(loss: None) -> None: ...
@overload
def perplexity(loss: float | None) -> float | None: ...
def perplexity(loss: float | None) -> float | None:
    """Return exp(loss), or infinity if that overflows; None of None."""
    if loss is None:
        return None
    return math.inf if loss >= 700 else math.exp(loss)


def loss_and_perplexity(metrics: Means) -> Means:
    """Return the values of a training record for masked language modelling."""
    return {"loss": metrics["loss"], "perplexity": perplexity(metrics["loss"])}


class LossReduction(ABC):
    """Connects a loss to Megatron-Core's schedules; subclass it and write `forward`."""

    @abstractmethod
    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """Compute the terms of one micro-batch.

        Args:
            batch: The micro-batch, with its labels.
            output: What the model's last stage returned for it.
        """

    def bind(self, batch: Any) -> Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Return the function that the schedule calls with the model's output for `batch`.

        It returns the three values of Megatron-Core's per-token form: the sum to differentiate, the int32
        count that the gradients will be divided by, and the report that `means` combines.
        """
        return partial(self._schedule_loss, batch)

    def terms(self, batch: Any, output: Tensor) -> LossTerms:
        """Call `forward`.

        Raises:
            UserError: It is a user's own and failed, or what it returned is no sum with a count.
        """
        if type(self).__module__.startswith("esm2mega."):
            return checked_terms(self, self.forward(batch, output), output)
        name = f"{type(self).__name__}.forward"
        return checked_terms(self, users_code.call(name, self.forward, batch, output), output)

    def _schedule_loss(self, batch: Any, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        terms = self.terms(batch, output)
        named = {"loss": (terms.loss_sum, terms.count), **terms.logged}
        # fp64 sums: a report over millions of labels must not lose digits. [2] each: sum, count
        report = {name: torch.stack([x.detach().double() for x in pair]) for name, pair in named.items()}
        return terms.loss_sum, terms.count.to(torch.int32), report

    def means(self, reports: Sequence[dict[str, Tensor]], device: torch.device) -> Means:
        """Combine the reports of a step or of an evaluation, and wait for the result.

        The arguments are those of `totals`, the result is that of `means_of`.
        """
        return self.means_of(self.totals(reports, device).tolist())

    def totals(self, reports: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Add up the reports of a step or of an evaluation, without waiting for them.

        Args:
            reports: One per micro-batch; empty on all but the last pipeline stage.
            device: Where the process groups communicate.

        Returns:
            Global sum and count of each of `names`, fp64 ``[names, 2]`` on the device; valid on every rank.
        """
        totals = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)
        for report in reports:
            totals += torch.stack([report[name] for name in self.names])
        # After the sum over the data-parallel group the last stages agree; each then tells its own pipeline.
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        if pipeline.size() > 1:
            dist.broadcast(totals, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
        return totals

    def means_of(self, totals: Sequence[Sequence[float]]) -> Means:
        """Divide the sums of `totals` by their counts.

        Returns:
            Global mean of each name (None if its global count is 0) and ``count``, the global number of
            labels.
        """
        pairs = zip(self.names, totals, strict=True)
        means = {name: total / count if count else None for name, (total, count) in pairs}
        return {**means, "count": totals[self.names.index("loss")][1]}

    @property
    def names(self) -> tuple[str, ...]:
        """Return what is reported, equal on all ranks: ``loss`` and the keys of `LossTerms.logged`."""
        return ("loss",)


def checked_terms(loss: LossReduction, terms: Any, output: Tensor) -> LossTerms:
    """Return the terms, with a count that is a tensor."""
    name = type(loss).__name__
    if not isinstance(terms, LossTerms):
        parts = ", ".join(type(part).__name__ for part in terms) if isinstance(terms, tuple) else ""
        raise UserError(
            f"{name}.forward returned a {type(terms).__name__}{f' ({parts})' if parts else ''}; return "
            "LossTerms(loss_sum, count): the sum over the labels of the micro-batch, not their mean, and "
            "their number"
        )
    total, count = terms.loss_sum, terms.count
    if not isinstance(count, Tensor):
        count = (
            torch.full((), count, device=output.device) if isinstance(count, int) else torch.as_tensor(count)
        )
    count = count.to(output.device)
    if not isinstance(total, Tensor) or total.dim():
        found = f"shape {list(total.shape)}" if isinstance(total, Tensor) else f"type {type(total).__name__}"
        raise UserError(
            f"{name}.forward returned a loss_sum of {found}; return the sum, a tensor of shape []"
        )
    if count.dim() or count.is_floating_point():
        raise UserError(
            f"{name}.forward returned a count of shape {list(count.shape)} and {count.dtype}; return the "
            "number of labels, an integer"
        )
    if output.requires_grad and torch.is_grad_enabled() and not total.requires_grad:
        raise UserError(
            f"{name}.forward returned a loss_sum that does not depend on the output (it has no gradient); "
            "compute it from the output without detach, item or numpy"
        )
    if {"loss", *terms.logged} != set(loss.names):
        raise UserError(
            f"{name}.forward logged {', '.join(terms.logged) or 'nothing'}, its `names` are "
            f"{', '.join(loss.names)}; let `names` return 'loss' and what is logged"
        )
    return replace(terms, count=count)


class MLMLossReduction(LossReduction):
    """Computes the cross-entropy at the masked positions.

    With `unigram` it also reports ``unigram_loss``: the cross-entropy on the same labels of predicting the
    training set's residue frequencies, which a model must beat to have learned anything.
    """

    def __init__(self, unigram: Tensor | None = None) -> None:
        """Set `unigram`, log-probabilities of tokens in the training set, ``[v]``; None for no baseline."""
        self.unigram = unigram

    @property
    def names(self) -> tuple[str, ...]:
        return ("loss",) if self.unigram is None else ("loss", "unigram_loss")

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """Compute the terms of `batch.labels`, int64 ``[m]``, and logits ``[m, v]``, in fp32 at least."""
        logits = output if output.dtype == torch.float64 else output.float()
        # The sum of no labels is 0 with a gradient of 0.
        loss_sum = cross_entropy(logits, batch.labels, reduction="sum")
        # Filled on the device: `torch.tensor` would copy the number there, and wait for the copy.
        count = torch.full((), batch.labels.numel(), device=output.device)
        if self.unigram is None:
            return LossTerms(loss_sum, count)
        unigram_sum = -self.unigram[batch.labels].sum()
        return LossTerms(loss_sum, count, {"unigram_loss": (unigram_sum, count)})
