"""Losses of labelled proteins and residues, as sums over the labels that are there and their number.

A label that is missing (NaN of numbers, -100 of classes) is not summed and not counted.

Legend: ``n`` proteins and ``R`` residues of a micro-batch, ``k`` targets or classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.targets import IGNORED, TargetInfo
from esm2mega.errors import UserError
from esm2mega.train.losses import LossReduction, LossTerms


class TaskLossReduction(LossReduction):
    """Base of the losses of tasks."""

    def predictions(self, output: Tensor) -> Tensor:
        """What is kept of the head's output ``[rows, k]``: values in units of the labels, or probabilities.
        Of contacts logits, in fp32 at least: probabilities near 1 round to 1, and would have no order.
        """
        return _at_least_fp32(output)


class RegressionLossReduction(TaskLossReduction):
    """Squared or Huber loss of numbers, ``[n, k]``.

    With `mean` and `std` labels are scaled before they are compared; the loss is then in scaled units, and
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
            huber_delta: In scaled units.
            mean: Of each target, a number or k of them.
            std: Of each target.
        """
        self.loss, self.huber_delta = loss, huber_delta
        self._mean = torch.as_tensor(mean, dtype=torch.float64)
        self._std = torch.as_tensor(std, dtype=torch.float64)

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """`batch.labels` float64 ``[n, k]``, NaN for none; `output` ``[n, k]``, taken to fp32 at least."""
        values = _at_least_fp32(output)
        labels = _as_column(batch.labels)
        there = ~torch.isnan(labels)
        scaled = ((labels - self._mean.to(labels.device)) / self._std.to(labels.device)).to(values.dtype)
        # Missing labels are replaced before the loss: NaN times 0 would still be NaN.
        scaled = torch.where(there, scaled, values.detach())
        if self.loss == "huber":
            each = F.huber_loss(values, scaled, reduction="none", delta=self.huber_delta)
        else:
            each = F.mse_loss(values, scaled, reduction="none")
        return LossTerms(each.sum(), there.sum())

    def predictions(self, output: Tensor) -> Tensor:
        return output.double() * self._std.to(output.device) + self._mean.to(output.device)


class TokenRegressionLossReduction(RegressionLossReduction):
    """The same for one number per residue: labels ``[R]``, output ``[R, 1]``."""


class ClassificationLossReduction(TaskLossReduction):
    """Cross-entropy of classes, ``[n]``.

    With class weights the loss of a label is multiplied by the weight of its class; what it is divided by is
    still the number of labels.
    """

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        """Args: class_weights: ``[k]``, or None. label_smoothing: share spread over all classes."""
        self._weights, self.label_smoothing = class_weights, label_smoothing

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """`batch.labels` int64 ``[n]``, -100 for none; `output` logits ``[n, k]``."""
        logits = _at_least_fp32(output)
        weights = None if self._weights is None else self._weights.to(logits)
        loss_sum = F.cross_entropy(
            logits,
            batch.labels,
            weights,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return LossTerms(loss_sum, (batch.labels != IGNORED).sum())

    def predictions(self, output: Tensor) -> Tensor:
        return output.double().softmax(dim=-1)


class TokenClassificationLossReduction(ClassificationLossReduction):
    """The same for residues: labels ``[R]``, output ``[R, k]``."""


class MultilabelLossReduction(TaskLossReduction):
    """Binary cross-entropy of each of k labels, ``[n, k]``."""

    def __init__(self, positive_weights: Tensor | None = None) -> None:
        """Args: positive_weights: of the loss of a label that is 1, ``[k]``, or None."""
        self._weights = positive_weights

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """`batch.labels` float64 ``[n, k]``, 0 or 1, NaN for none; `output` logits ``[n, k]``."""
        logits = _at_least_fp32(output)
        there = ~torch.isnan(batch.labels)
        labels = torch.where(there, batch.labels, 0.0).to(logits.dtype)
        weights = None if self._weights is None else self._weights.to(logits)
        each = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
        return LossTerms((each * there).sum(), there.sum())

    def predictions(self, output: Tensor) -> Tensor:
        return output.double().sigmoid()


class ContactLossReduction(TaskLossReduction):
    """Binary cross-entropy of pairs of residues, ``[P]``.

    That of two classes, as TAPE has it, over the pairs i < j: their mean is that over the whole map.
    """

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        """`batch.labels` int8 ``[P]``, 0 or 1, -100 for none; `output` logits of a contact ``[P, 1]``."""
        logits = _at_least_fp32(output[:, 0])
        there = batch.labels != IGNORED
        labels = (batch.labels == 1).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return LossTerms((each * there).sum(), there.sum())


def loss_of_task(task: TaskConfig, info: TargetInfo) -> TaskLossReduction:
    """The loss that a configuration names.

    Args:
        task: Which one.
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
    return TokenClassificationLossReduction(weights, task.label_smoothing)


def balanced_weights(info: TargetInfo) -> Tensor:
    """Total / (k * count) of each class, fp64 ``[k]``: their mean over the training labels is 1.

    These are the weights that scikit-learn calls balanced.
    """
    if 0 in info.counts or len(info.counts) < info.num_outputs:
        raise UserError(
            "task.class_weights=balanced: not every class of the head has a label in the training data; set "
            "task.class_weights=none"
        )
    counts = torch.tensor(info.counts, dtype=torch.float64)
    return counts.sum() / (len(counts) * counts)


def _at_least_fp32(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _as_column(labels: Tensor) -> Tensor:
    """``[R] -> [R, 1]``; labels of proteins have columns already."""
    return labels[:, None] if labels.dim() == 1 else labels
