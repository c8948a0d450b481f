"""Losses are global sums over global counts, whatever the micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.batch import PackedBatch
from esm2mega.train.losses import LossReduction, LossTerms, MLMLossReduction, loss_and_perplexity
from esm2mega.train.step import run_schedule
from tests.unit.runs import CPU, packed_batch, tiny_run, train_state

# Three micro-batches of 4, 0 and 1 labels, equally long.
BATCHES = [
    packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23}),
    packed_batch([[0, 8, 2], [0, 9, 2]], {}),
    packed_batch([[0, 32, 2], [0, 11, 2]], {1: 17}),
]
LABELS = torch.tensor([5, 9, 4, 23, 17])


def _logits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        (3 * torch.randn(len(batch.labels), 33, generator=generator, dtype=torch.float64)).requires_grad_()
        for batch in BATCHES
    ]


def _reports(loss: LossReduction, logits: list[Tensor]) -> list[dict[str, Tensor]]:
    return [loss.bind(batch)(output)[2] for batch, output in zip(BATCHES, logits, strict=True)]


def test_mean_is_that_over_all_labels(world: None) -> None:
    logits = _logits()
    metrics = MLMLossReduction().means(_reports(MLMLossReduction(), logits), CPU)
    expected = cross_entropy(torch.cat(logits), LABELS).item()
    assert metrics == {"loss": pytest.approx(expected, rel=1e-14), "count": 5.0}
    means = [cross_entropy(x, b.labels).item() for x, b in zip(logits, BATCHES, strict=True) if len(b.labels)]
    assert abs(sum(means) / len(means) - expected) > 0.01, "a mean of means would pass as well"


def test_schedule_gets_sum_and_count() -> None:
    output = _logits()[0]
    loss_sum, count, report = MLMLossReduction().bind(BATCHES[0])(output)
    assert loss_sum.item() == pytest.approx(4 * cross_entropy(output, BATCHES[0].labels).item(), rel=1e-14)
    assert loss_sum.requires_grad
    assert (count.item(), count.dtype) == (4, torch.int32)
    assert report["loss"].tolist() == pytest.approx([loss_sum.item(), 4], rel=1e-15)
    assert not report["loss"].requires_grad


def test_no_labels_contribute_nothing() -> None:
    output = _logits()[1]
    loss_sum, count, _ = MLMLossReduction().bind(BATCHES[1])(output)
    assert (loss_sum.item(), count.item()) == (0.0, 0)
    loss_sum.backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize(
    "reports", [[], [{"loss": torch.zeros(2, dtype=torch.float64)}]], ids=["none", "empty"]
)
def test_nothing_to_predict_has_no_mean(world: None, reports: list[dict[str, Tensor]]) -> None:
    assert MLMLossReduction().means(reports, CPU) == {"loss": None, "count": 0.0}


def test_each_mean_has_a_count_of_its_own(world: None) -> None:
    """A loss over one label is 0 where it is 0; what is logged beside it over none is None."""
    unigram = MLMLossReduction(torch.zeros(33))
    zero, nothing = torch.tensor([0.0, 1.0]).double(), torch.zeros(2).double()
    found = unigram.means([{"loss": zero, "unigram_loss": nothing}], CPU)
    assert found == {"loss": 0.0, "unigram_loss": None, "count": 1.0}


def test_perplexity_of_nothing_is_none() -> None:
    assert loss_and_perplexity({"loss": None, "count": 0.0}) == {"loss": None, "perplexity": None}
    assert loss_and_perplexity({"loss": 0.0, "count": 1.0}) == {"loss": 0.0, "perplexity": 1.0}


def test_bf16_logits_are_taken_to_fp32() -> None:
    output = _logits()[0].detach().bfloat16()
    loss_sum, _, _ = MLMLossReduction().bind(BATCHES[0])(output)
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(
        cross_entropy(output.double(), BATCHES[0].labels, reduction="sum").item(), rel=1e-6
    )


def test_unigram_is_measured_on_the_same_labels(world: None) -> None:
    unigram = torch.linspace(1, 2, 33, dtype=torch.float64)
    unigram = (unigram / unigram.sum()).log()
    loss = MLMLossReduction(unigram)
    metrics = loss.means(_reports(loss, _logits()), CPU)
    assert metrics["unigram_loss"] == pytest.approx(
        -sum(unigram[i].item() for i in (5, 9, 4, 23, 17)) / 5, rel=1e-14
    )
    assert metrics["loss"] == pytest.approx(cross_entropy(torch.cat(_logits()), LABELS).item(), rel=1e-14)
    assert loss.names == ("loss", "unigram_loss")


def test_gradient_is_that_of_the_mean_over_all_labels(world: None) -> None:
    """Through the schedule and the division after it; the micro-batch without labels leaves no NaN."""
    state = train_state(tiny_run())
    (wrapped,) = state.model
    wrapped.zero_grad_buffer()
    reports = run_schedule(state.model, state.loss, BATCHES, CPU, forward_only=False)
    metrics = state.loss.means(reports, CPU)
    actual = {name: parameter.main_grad.clone() for name, parameter in wrapped.module.named_parameters()}

    wrapped.zero_grad_buffer()
    logits = torch.cat([_forward(wrapped.module, batch) for batch in BATCHES])
    expected = cross_entropy(logits, LABELS)
    gradients = torch.autograd.grad(expected, list(wrapped.module.parameters()))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-13)
    for (name, value), reference in zip(actual.items(), gradients, strict=True):
        assert (value - reference).abs().max() <= 1e-12 * reference.abs().max(), name


def _forward(model: Any, batch: PackedBatch) -> Tensor:
    from esm2mega.model.packed import PackedSequences

    return model(batch.input_ids, PackedSequences.from_lengths(batch.seqlens), batch.label_positions)


class Focal(LossReduction):
    """As a user would write it: another loss, and how often the model is right."""

    names = ("loss", "accuracy")

    def forward(self, batch: PackedBatch, output: Tensor) -> LossTerms:
        each = cross_entropy(output, batch.labels, reduction="none")
        loss = ((1 - (-each).exp()) ** 2 * each).sum()
        count = torch.tensor(batch.labels.numel())
        right = (output.argmax(dim=-1) == batch.labels).sum()
        return LossTerms(loss, count, {"accuracy": (right, count)})


def test_a_users_loss_runs_through_the_schedule(world: None) -> None:
    state = train_state(tiny_run())
    (wrapped,) = state.model
    wrapped.zero_grad_buffer()
    metrics = Focal().means(run_schedule(state.model, Focal(), BATCHES, CPU, forward_only=False), CPU)
    logits = torch.cat([_forward(wrapped.module, batch) for batch in BATCHES])
    each = cross_entropy(logits, LABELS, reduction="none")
    assert metrics["loss"] == pytest.approx(((1 - (-each).exp()) ** 2 * each).mean().item(), rel=1e-13)
    assert metrics["accuracy"] == (logits.argmax(-1) == LABELS).double().mean().item()
    assert metrics["count"] == 5.0
    assert all(p.main_grad.any() for p in wrapped.module.parameters())
