"""A mean over the micro-batch becomes a sum over all labels, however these are split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from esm2mega.errors import UserError
from esm2mega.finetune.classes import LossReduction
from tests.own_classes import RootOfSquaredError, SquaredError

CPU = torch.device("cpu")
LABELS = torch.tensor([[0.5], [2.0], [-1.0], [4.0], [0.0], [1.5], [7.0]], dtype=torch.float64)
OUTPUT = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]


def summed(loss: LossReduction, sizes: list[int]) -> tuple[float, float, Tensor]:
    """Loss, logged loss and gradient with micro-batches of these sizes, as the schedule computes them."""
    output = OUTPUT.clone().requires_grad_()
    reports, sums, counts = [], [], []
    for labels, part in zip(LABELS.split(sizes), output.split(sizes), strict=True):
        total, count, report = loss.bind(SimpleNamespace(labels=labels))(part)
        sums.append(total)
        counts.append(count)
        reports.append(report)
    mean = torch.stack(sums).sum() / torch.stack(counts).sum()
    mean.backward()
    assert output.grad is not None
    logged = loss.means(reports, CPU)["loss"]
    assert logged is not None
    return float(mean.detach()), logged, output.grad


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 0, 4], [2, 2, 2, 1]])
def test_means_of_micro_batches_give_the_mean_of_all(sizes: list[int]) -> None:
    output = OUTPUT.clone().requires_grad_()
    expected = torch.nn.functional.mse_loss(output, LABELS)
    expected.backward()
    assert output.grad is not None
    mean, logged, gradient = summed(SquaredError(), sizes)
    # Sums of seven numbers in two orders.
    assert abs(mean - expected.item()) < 1e-14 and abs(logged - expected.item()) < 1e-14
    assert (gradient - output.grad).abs().max() < 1e-15
    # `reduce` changes what is logged, and nothing else.
    same, root, other = summed(RootOfSquaredError(), sizes)
    assert (same, torch.equal(gradient, other)) == (mean, True)
    assert abs(root - expected.item() ** 0.5) < 1e-14


class Returns(LossReduction):
    """Returns what it was given; the second value is logged under the name of the class."""

    def __init__(self, value: Any, names: tuple[str, ...] = ("loss",)) -> None:
        self.value, self._names = value, names

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def forward(self, batch: Any, forward_out: Tensor) -> Any:
        return self.value(batch, forward_out)


def terms(value: Any, labels: Tensor = LABELS, output: Tensor = OUTPUT, **given: Any) -> Any:
    return Returns(value, **given).terms(SimpleNamespace(labels=labels), output.clone().requires_grad_())


def test_a_sum_and_a_count_are_taken_as_they_are() -> None:
    found = terms(lambda batch, out: (out.sum(), 3))
    assert float(found.loss_sum.detach()) == float(OUTPUT.sum()) and found.count.item() == 3


def test_labels_that_are_missing_are_masked_and_not_counted() -> None:
    labels = LABELS.clone()
    labels[2] = torch.nan

    def known(batch: Any, out: Tensor) -> Any:
        loss = (out - batch["labels"]).square()[batch["loss_mask"]].mean()
        return loss, {"avg": loss, "bias": (out - batch["labels"])[batch["loss_mask"]].mean()}

    found = terms(known, labels, names=("loss", "bias"))
    there = ~labels.isnan()
    assert found.count.item() == 6
    expected = (OUTPUT - LABELS)[there]
    assert abs(float(found.loss_sum.detach() - expected.square().sum())) < 1e-13
    total, count = found.logged["bias"]
    assert (count.item(), abs(float(total.detach() - expected.sum())) < 1e-13) == (6, True)


def test_a_pack_without_labels_gives_zero_with_a_gradient_of_zero() -> None:
    """The mean of nothing would be NaN, and would spoil all others."""
    output = OUTPUT[:0].clone().requires_grad_()
    found = Returns(lambda batch, out: 1 / 0).terms(SimpleNamespace(labels=LABELS[:0]), output)
    found.loss_sum.backward()
    assert (float(found.loss_sum.detach()), found.count.item(), output.grad.shape) == (0.0, 0, (0, 1))


def test_classes_are_compared_as_integers_and_outputs_are_wide() -> None:
    labels, logits = torch.tensor([0, -100, 1]), torch.ones(3, 2, dtype=torch.bfloat16)

    def entropy(batch: Any, out: Tensor) -> Any:
        assert (batch["labels"].dtype, out.dtype) == (torch.int64, torch.float32)
        loss = torch.nn.functional.cross_entropy(out, batch["labels"])
        return loss, {"avg": loss}

    found = terms(entropy, labels, logits)
    assert found.count.item() == 2 and abs(float(found.loss_sum.detach()) - 2 * 0.6931472) < 1e-6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda batch, out: out.mean(), 'Returns.forward returned a Tensor; return .loss, {"avg": loss}.'),
        (lambda batch, out: (out, {"avg": out}), r"a loss of shape \[7, 1\], which is no single number"),
        (lambda batch, out: (out.mean().item(), {}), "a loss of type float, which is no single number"),
        (lambda batch, out: (out.mean(), {"mean": out.mean()}), "returned a dictionary of 'mean'; return"),
        (lambda batch, out: (out.mean(), {"avg": 1, "mae": 1.0}), "logged mae, its `names` are loss"),
        (lambda batch, out: (out.mean(), 1.5), "a count of shape .. and torch.float32; return the"),
        (lambda batch, out: (out.mean().detach(), {"avg": 1}), "does not depend on the output"),
        (lambda batch, out: (out.mean(), batch.labels), "failed at .*test_loss.py:.*no attribute 'labels'"),
    ],
)
def test_what_a_loss_may_return(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        terms(value)
    assert "\n" not in str(caught.value)
