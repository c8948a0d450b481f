"""One optimizer step: what it returns, and that it refuses to go on from numbers that are none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esm2mega.batch import PackedBatch
from esm2mega.errors import MachineError
from esm2mega.train.losses import LossReduction, LossTerms
from esm2mega.train.step import TrainState, train_step
from tests.unit.runs import packed_batch, tiny_run, train_state

BATCHES = [packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23})]


class Constant(LossReduction):
    """A loss of a chosen value with a chosen gradient."""

    def __init__(self, value: float, slope: float) -> None:
        self.value, self.slope = value, slope

    def forward(self, batch: PackedBatch, output: Tensor) -> LossTerms:
        copied = output.clone()
        copied.register_hook(lambda gradient: torch.full_like(gradient, self.slope))
        return LossTerms((0 * copied).sum() + self.value, torch.tensor(1))


def _weights(state: TrainState) -> list[Tensor]:
    return [p.detach().clone() for p in state.model[0].module.parameters()]


def test_step_learns(world: None) -> None:
    state = train_state(tiny_run("optim.lr=1e-2"))
    results = [train_step(state, BATCHES) for _ in range(15)]
    assert results[0].metrics["loss"] == pytest.approx(math.log(33), abs=0.3)
    assert results[-1].metrics["loss"] < 0.5 * results[0].metrics["loss"]
    assert results[0].metrics["count"] == 4
    assert results[0].lr == 1e-2


def test_gradients_of_the_last_step_are_forgotten(world: None) -> None:
    state = train_state(tiny_run("optim.lr=1e-300"))
    first, second = (train_step(state, BATCHES).grad_norm for _ in range(2))
    assert first == pytest.approx(second, rel=1e-12)


def test_rate_is_the_one_that_the_update_used(world: None) -> None:
    state = train_state(tiny_run("schedule.warmup_steps=2", "train.max_steps=10"))
    before = _weights(state)
    assert train_step(state, BATCHES).lr == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(state), strict=True))
    assert train_step(state, BATCHES).lr == 1e-3
    assert not torch.equal(before[0], _weights(state)[0])


def test_a_step_without_labels_has_no_loss_and_no_gradient(world: None) -> None:
    state = train_state(tiny_run())
    result = train_step(state, [packed_batch([[0, 5, 7, 2]], {})])
    assert (result.metrics, result.grad_norm) == ({"loss": None, "count": 0.0}, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_no_number_ends_the_run_before_the_update(world: None, value: float) -> None:
    state = train_state(tiny_run())
    state.loss = Constant(value, 1.0)
    before = _weights(state)
    with pytest.raises(MachineError, match=f"the loss is {value}; lower optim.lr"):
        train_step(state, BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(state), strict=True))


def test_gradient_that_is_no_number_ends_the_run(world: None) -> None:
    state = train_state(tiny_run())
    state.loss = Constant(1.0, math.nan)
    with pytest.raises(MachineError, match="the gradient norm is nan"):
        train_step(state, BATCHES)
