"""Losses of tasks against PyTorch's and scikit-learn's, with labels missing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from esm2mega.config.schema import TaskConfig
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.losses import (
    ClassificationLossReduction,
    MultilabelLossReduction,
    RegressionLossReduction,
    TaskLossReduction,
    balanced_weights,
    loss_of_task,
)

NAN = float("nan")
LOGITS = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3


def terms(loss: TaskLossReduction, labels: torch.Tensor, output: torch.Tensor = LOGITS):
    output = output.clone().requires_grad_()
    found = loss.forward(SimpleNamespace(labels=labels), output)
    found.loss_sum.backward()
    assert output.grad is not None and output.grad.isfinite().all()
    return found, output.grad


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_regression_counts_the_labels_that_are_there(kind: str) -> None:
    labels = torch.tensor([[1.0, NAN, 2.0], [NAN] * 3, [4.0, 5.0, NAN], [0.5, NAN, 9.0], [NAN, 1.0, 2.0]])
    labels = labels.double()
    loss = RegressionLossReduction(kind, 0.7, [1.0, 2.0, 3.0], [2.0, 0.5, 4.0])
    found, gradient = terms(loss, labels)
    there = ~labels.isnan()
    scaled = ((labels - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([2.0, 0.5, 4.0]))[there]
    reference = F.mse_loss if kind == "mse" else lambda a, b, reduction: F.huber_loss(a, b, reduction, 0.7)
    assert found.loss_sum.item() == pytest.approx(reference(LOGITS[there], scaled, reduction="sum").item())
    assert found.count == there.sum() == 8
    assert torch.equal(gradient != 0, there)
    # Predictions are in the units of the labels.
    back = (loss.predictions(LOGITS) - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([2.0, 0.5, 4.0])
    assert (back - LOGITS).abs().max() < 1e-14


def test_classification_weights_and_smoothing() -> None:
    labels = torch.tensor([2, -100, 0, 1, 2])
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    found, gradient = terms(ClassificationLossReduction(weights, 0.1), labels)
    expected = F.cross_entropy(LOGITS, labels, weights, reduction="sum", label_smoothing=0.1)
    assert found.loss_sum.item() == expected.item()
    assert found.count == 4 and not gradient[1].any()


def test_targets_of_residues_have_a_cross_entropy_each() -> None:
    """With masks, weights and smoothing of their own; a target without labels adds nothing."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.tensor([[0, 2], [1, -100], [-100, 0], [-100, -100], [1, 1], [0, 2]])
    weights = torch.tensor([0.5, 2.0, 1.5, 0.25, 3.0], dtype=torch.float64)
    loss = ClassificationLossReduction(weights, 0.1, [2, 3])
    found, gradient = terms(loss, labels, logits)
    parts = logits[:, :2], logits[:, 2:]
    expected = [
        F.cross_entropy(part, of, weight, reduction="sum", label_smoothing=0.1)
        for part, of, weight in zip(parts, labels.T, (weights[:2], weights[2:]), strict=True)
    ]
    assert found.loss_sum.item() == pytest.approx(sum(expected).item(), rel=1e-15) and found.count == 8
    assert not gradient[1, 2:].any() and not gradient[2:4, :2].any() and not gradient[3].any()
    assert torch.equal(loss.predictions(logits), torch.cat([x.softmax(1) for x in parts], 1))
    # The same as training on the first target alone.
    first = labels.clone()
    first[:, 1] = -100
    found, gradient = terms(loss, first, logits)
    alone, of_alone = terms(ClassificationLossReduction(weights[:2], 0.1), labels[:, 0], parts[0])
    assert (found.loss_sum.item(), found.count) == (alone.loss_sum.item(), alone.count)
    assert torch.equal(gradient[:, :2], of_alone) and not gradient[:, 2:].any()


def test_multilabel() -> None:
    labels = torch.tensor([[1.0, 0, NAN], [0, 0, 1], [NAN] * 3, [1, 1, 1], [0, NAN, 0]]).double()
    found, gradient = terms(MultilabelLossReduction(), labels)
    there = ~labels.isnan()
    expected = F.binary_cross_entropy_with_logits(LOGITS[there], labels[there], reduction="sum")
    assert found.loss_sum.item() == pytest.approx(expected.item())
    assert found.count == 10 and torch.equal(gradient != 0, there)


@pytest.mark.parametrize("kind", ["regression", "classification", "multilabel", "token_regression"])
def test_no_labels_are_zero_of_zero(kind: str) -> None:
    info = TargetInfo(kind, ["a", "b", "c"], [3, 2, 1], [0.0] * 3, [1.0] * 3)
    loss = loss_of_task(TaskConfig(kind=kind), info)
    classes = kind == "classification"
    for labels in (
        torch.full((5,), -100) if classes else torch.full((5, 3), NAN, dtype=torch.float64),
        torch.zeros(0, dtype=torch.int64) if classes else torch.zeros(0, 3, dtype=torch.float64),
    ):
        found, gradient = terms(loss, labels, LOGITS[: len(labels)])
        assert (found.loss_sum.item(), found.count.item()) == (0.0, 0)
        assert not gradient.any()


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    utils = pytest.importorskip("sklearn.utils.class_weight", reason="scikit-learn is not installed")
    labels = np.array([0] * 7 + [1] * 2 + [2] * 5)
    expected = utils.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    info = TargetInfo("classification", ["x", "y", "z"], [7, 2, 5])
    assert balanced_weights(info).tolist() == pytest.approx(expected.tolist(), rel=1e-15)
    # Each target of residues is balanced for itself.
    info = TargetInfo(
        "token_classification", list("xyzuv"), [7, 2, 5, 4, 1], columns=["a", "b"], widths=[3, 2]
    )
    second = utils.compute_class_weight("balanced", classes=np.arange(2), y=np.array([0] * 4 + [1]))
    assert balanced_weights(info).tolist() == pytest.approx([*expected, *second], rel=1e-15)
    # A declared class without training labels is none of the classes that are balanced.
    declared = TargetInfo("classification", ["x", "unseen", "y", "z"], [7, 0, 2, 5], untrained=[1])
    assert balanced_weights(declared).tolist() == pytest.approx([expected[0], 1.0, *expected[1:]], rel=1e-15)
