"""Heads and losses as users write them, which a checkpoint names and never brings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.finetune.losses import RegressionLossReduction, TaskLossReduction
from esm2mega.model import pooling
from esm2mega.model.heads import TaskHead
from esm2mega.train.losses import LossTerms


class MeanHead(TaskHead):
    """A linear layer on the mean of the residues."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.output = self._linear(config.hidden_size, 1)

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        return pooling.mean_of_residues(hidden_states, segments)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(features)


class OtherHead(MeanHead):
    """The same tensors, and another function of them."""

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return 2 * self.output(features)


class FlatHead(MeanHead):
    """What others often write: a number for each protein in place of a row."""

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(features).squeeze(-1)


class AbsoluteLoss(TaskLossReduction):
    """The absolute difference from the labels as they are."""

    names = ("loss", "bias")

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        difference = output - batch.labels
        count = torch.tensor(difference.numel())
        return LossTerms(difference.abs().sum(), count, {"bias": (difference.sum(), count)})


class OtherLoss(AbsoluteLoss):
    """Another loss with the same units."""


class HalfScale(RegressionLossReduction):
    """The squared difference, of labels that are halved."""

    def __init__(self) -> None:
        super().__init__(mean=1.0, std=2.0)


class LogLoss(TaskLossReduction):
    """Outputs are logarithms, which only the loss knows."""

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        difference = output - batch.labels.log()
        return LossTerms(difference.square().sum(), torch.tensor(difference.numel()))

    def predictions(self, output: Tensor) -> Tensor:
        return output.double().exp()


class FlagLoss(TaskLossReduction):
    """The cross-entropy of several labels, from logits."""

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            output, batch.labels.to(output), reduction="none"
        )
        return LossTerms(each.sum(), torch.tensor(each.numel()))


class FailingLoss(AbsoluteLoss):
    """What a mistake in the code of a user looks like: a name that does not exist."""

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        return self.missing(batch, output)  # type: ignore  # the mistake


class FailingPredictions(LogLoss):
    def predictions(self, output: Tensor) -> Tensor:
        return output[:, 1]  # the mistake


class FailingHead(MeanHead):
    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(features[:, 1:])  # the mistake


class FailingFeatures(MeanHead):
    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        return hidden_states.missing  # type: ignore  # the mistake


class FailingInit(MeanHead):
    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.output = self._linear(config.missing, 1)  # the mistake


class FailingLossInit(AbsoluteLoss):
    def __init__(self) -> None:
        raise ValueError("delta is missing")


class NeedsArguments(AbsoluteLoss):
    def __init__(self, delta: float) -> None:
        self.delta = delta


NOT_A_CLASS = 3
