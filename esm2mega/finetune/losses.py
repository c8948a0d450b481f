"""Computes losses of labelled proteins and residues, each as a sum over the known labels and their number.

A label that is missing (NaN of numbers, -100 of classes) is not summed and not counted.

Legend: ``n`` proteins and ``R`` residues of a micro-batch, ``k`` outputs, ``m`` target columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.errors import UserError
from esm2mega.train.losses import LossReduction, LossTerms


class TaskLossReduction(LossReduction):
    """Serves as base class of the losses of tasks; a user's own loss writes `forward` alone.

    Outputs then are numbers in the units of `batch.labels`, and logits of classes. A loss that means
    something else by them overrides `predictions`; then nothing can be predicted without the loss.
    """

    def predictions(self, output: Tensor) -> Tensor:
        """Turn the head's output ``[rows, k]`` into values in units of the labels, or into probabilities.

        Contacts stay logits, in fp32 at least: probabilities near 1 round to 1, and would have no order.
        """
        return _at_least_fp32(output)


class RegressionLossReduction(TaskLossReduction):
    """Computes the squared or Huber loss of numbers, ``[n, k]``.

    With `mean` and `std`, labels are scaled before they are compared; the loss is then in scaled units, and
    `predictions` scales back.
    """

    def __init__(
        self,
        loss: str = "mse",
        huber_delta: float = 1.0,
        mean: Any = 0.0,
        std: Any = 1.0,
    ) -> None:
        """Make the loss.

        Args:
            loss: ``mse``, or ``huber``: quadratic up to `huber_delta`, linear beyond (as `F.huber_loss`).
            huber_delta: Border between the two parts of the Huber loss, in scaled units.
            mean: Mean of each target; one number, or k of them.
            std: Standard deviation of each target; one number, or k of them.
        """
        self.loss, self.huber_delta = loss, huber_delta
        self._mean = torch.as_tensor(mean, dtype=torch.float64)
        self._std = torch.as_tensor(std, dtype=torch.float64)

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """Sum the loss of `output` ``[n, k]``, in fp32 at least.

        `batch.labels` are float64 ``[n, k]``, NaN where there is no label.
        """
        values = _at_least_fp32(output)
        labels = batch.labels
        there = ~torch.isnan(labels)
        mean, std = self._scale_on(labels.device)
        scaled = ((labels - mean) / std).to(values.dtype)
        # Missing labels are replaced before the loss: NaN times 0 would still be NaN.
        scaled = torch.where(there, scaled, values.detach())
        if self.loss == "huber":
            each = F.huber_loss(values, scaled, reduction="none", delta=self.huber_delta)
        else:
            each = F.mse_loss(values, scaled, reduction="none")
        return LossTerms(each.sum(), there.sum())

    def predictions(self, output: Tensor) -> Tensor:
        mean, std = self._scale_on(output.device)
        return output.double() * std + mean

    def _scale_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, which stay on the device: a copy waits for it."""
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self._mean, self._std

    def scale(self, num_outputs: int) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each of the k outputs."""
        try:
            return self._mean.expand(num_outputs).tolist(), self._std.expand(num_outputs).tolist()
        except RuntimeError:
            raise UserError(
                f"{type(self).__name__} has mean {self._mean.tolist()} and std {self._std.tolist()} for "
                f"{num_outputs} outputs; give one number, or one for each"
            ) from None


class TokenRegressionLossReduction(RegressionLossReduction):
    """Computes the squared or Huber loss of the numbers of residues; labels and output are ``[R, m]``."""


class ClassificationLossReduction(TaskLossReduction):
    """Computes the cross-entropy of classes, ``[n]``, or its sum over several targets with their own classes.

    With class weights, the loss of a label is multiplied by the weight of its class; the divisor is still the
    number of labels.
    """

    def __init__(
        self,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Make the loss.

        Args:
            class_weights: Weight of each class, ``[k]``; None for equal weights.
            label_smoothing: Share of the probability that is spread over all classes of the target.
            widths: Number of classes of each target, which are consecutive outputs; None for one target.
        """
        self._weights, self.label_smoothing = class_weights, label_smoothing
        self._widths = None if widths is None else list(widths)

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """Sum the loss of the logits `output` ``[n, k]``.

        `batch.labels` are int64 ``[n]`` or ``[n, m]``, -100 where there is no label.
        """
        logits = self._split(_at_least_fp32(output))
        labels = batch.labels[:, None] if batch.labels.dim() == 1 else batch.labels
        weights: Sequence[Tensor | None] = [None] * len(logits)
        if self._weights is not None:
            self._weights = self._weights.to(logits[0].device)  # once, since a copy waits for the device
            weights = self._split(self._weights.to(logits[0].dtype))
        sums = [
            F.cross_entropy(
                of_target,
                labels[:, number],
                weights[number],
                ignore_index=IGNORED,
                reduction="sum",
                label_smoothing=self.label_smoothing,
            )
            for number, of_target in enumerate(logits)
        ]
        return LossTerms(torch.stack(sums).sum(), (labels != IGNORED).sum())

    def predictions(self, output: Tensor) -> Tensor:
        return torch.cat([logits.softmax(dim=-1) for logits in self._split(output.double())], dim=-1)

    def _split(self, values: Tensor) -> Sequence[Tensor]:
        """Split ``[..., k]`` by target."""
        return values.split(self._widths or [values.shape[-1]], dim=-1)


class TokenClassificationLossReduction(ClassificationLossReduction):
    """Computes the cross-entropy of the classes of residues; labels are ``[R, m]``, output is ``[R, k]``."""


class MultilabelLossReduction(TaskLossReduction):
    """Computes the binary cross-entropy of each of k labels, ``[n, k]``."""

    def __init__(self, positive_weights: Tensor | None = None) -> None:
        """Make the loss.

        Args:
            positive_weights: Weight of the loss of a label that is 1, ``[k]``; None for 1.
        """
        self._weights = positive_weights

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """Sum the loss of the logits `output` ``[n, k]``.

        `batch.labels` are float64 ``[n, k]``, 0 or 1, NaN where there is no label.
        """
        logits = _at_least_fp32(output)
        there = ~torch.isnan(batch.labels)
        labels = torch.where(there, batch.labels, 0.0).to(logits.dtype)
        weights = None
        if self._weights is not None:
            self._weights = self._weights.to(logits.device)  # once, since a copy waits for the device
            weights = self._weights.to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
        return LossTerms((each * there).sum(), there.sum())

    def predictions(self, output: Tensor) -> Tensor:
        return output.double().sigmoid()


class ContactLossReduction(TaskLossReduction):
    """Computes the binary cross-entropy of pairs of residues, ``[P]``.

    It equals the cross-entropy of two classes that TAPE uses. The pairs are those with i < j; as the map is
    symmetric, their mean is the mean over the whole map.
    """

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """Sum the loss of `output` ``[P, 1]``, the logits of contacts.

        `batch.labels` are int8 ``[P]``, 0 or 1, -100 where there is no label.
        """
        logits = _at_least_fp32(output[:, 0])
        there = batch.labels != IGNORED
        labels = (batch.labels == 1).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return LossTerms((each * there).sum(), there.sum())


def loss_of_task(task: TaskConfig, info: TargetInfo) -> TaskLossReduction:
    """Make the loss that a configuration names.

    Args:
        task: The configured task, which names its loss.
        info: Scale of numbers and counts of classes, from the training data.
    """
    if task.kind in NUMERIC_KINDS:
        make = RegressionLossReduction if task.kind == "regression" else TokenRegressionLossReduction
        return make(task.loss, task.huber_delta, info.mean, info.std)
    if task.kind == "multilabel":
        return MultilabelLossReduction()
    if info.per_pair:
        return ContactLossReduction()
    weights = balanced_weights(info) if task.class_weights == "balanced" else None
    if task.kind == "classification":
        return ClassificationLossReduction(weights, task.label_smoothing)
    widths = [len(target.names) for target in info.targets]
    return TokenClassificationLossReduction(weights, task.label_smoothing, widths)


def balanced_weights(info: TargetInfo) -> Tensor:
    """Return the weights that scikit-learn calls balanced, fp64 ``[k]``.

    The weight of each of the c classes of a target that have training labels is total / (c * count); the mean
    over the target's training labels is 1. A class without one, which held-out labels may have, weighs 1.

    Raises:
        UserError: The head was not trained here, and does not know the numbers of its training labels.
    """
    if len(info.counts) < info.num_outputs:
        raise UserError(
            "task.class_weights=balanced: it is not known how many training labels the head's classes had; "
            "set task.class_weights=none"
        )
    counts = torch.tensor(info.counts, dtype=torch.float64)
    of_targets = [counts[target.outputs] for target in info.targets]
    return torch.cat([torch.where(x > 0, x.sum() / ((x > 0).sum() * x), 1.0) for x in of_targets])


def _at_least_fp32(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))
