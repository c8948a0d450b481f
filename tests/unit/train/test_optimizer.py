"""Learning rates at chosen steps, weight decay by kind of parameter, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esm2mega.errors import UserError
from esm2mega.model.build import build_model
from esm2mega.model.esm2 import ESM2Model
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.optimizer import build_optimizer, wrap_data_parallel
from esm2mega.train.step import TrainState, train_step
from tests.unit.runs import packed_batch, tiny_run, train_state

PEAK = 4e-4
BATCHES = [packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23})]


def _rates(*overrides: str, steps: int) -> list[float]:
    """The rate that each update uses, from step 0 on."""
    state = train_state(tiny_run(f"optim.lr={PEAK}", f"train.max_steps={steps}", *overrides))
    rates = []
    for _ in range(steps + 5):
        (rate,) = {group["lr"] for group in state.optimizer.param_groups}
        rates.append(rate)
        state.schedule.step(increment=1)
    return rates


def test_the_distributed_optimizer_in_fp64_on_a_gpu_is_refused() -> None:
    run = tiny_run()
    on_a_gpu: Any = SimpleNamespace(
        ddp_config=SimpleNamespace(use_distributed_optimizer=True),
        parameters=lambda: iter([SimpleNamespace(is_cuda=True)]),
    )
    with pytest.raises(
        UserError, match="no fp64 on a GPU; set parallel.distributed_optimizer=false or model"
    ):
        build_optimizer(run.optim, run.schedule, "fp64", [on_a_gpu])


def test_linear_is_the_published_schedule(world: None) -> None:
    """Up to w = 4 p s / w; from there a line to p / 10 at d = floor(0.9 N); flat after."""
    rates = _rates("schedule.name=linear", "schedule.warmup_steps=4", steps=40)
    assert rates[0] == 0.0
    expected = {0: 0.0, 1: 1e-4, 2: 2e-4, 4: 4e-4, 20: 2.2e-4, 36: 4e-5, 37: 4e-5, 44: 4e-5}
    assert {s: rates[s] for s in expected} == pytest.approx(expected, rel=1e-12)
    whole = [PEAK * s / 4 if s < 4 else PEAK * max(1 - 0.9 * (s - 4) / 32, 0.1) for s in range(45)]
    assert rates == pytest.approx(whole, rel=1e-12)


def test_cosine_ends_at_the_last_step(world: None) -> None:
    rates = _rates("schedule.name=cosine", "schedule.warmup_steps=4", steps=36)
    expected = {
        0: 0.0,
        2: 2e-4,
        4: 4e-4,
        12: 4e-5 + 3.6e-4 * (2 + math.sqrt(2)) / 4,
        20: 2.2e-4,
        36: 4e-5,
        40: 4e-5,
    }
    assert {s: rates[s] for s in expected} == pytest.approx(expected, rel=1e-12)


def test_cosine_plateau_ends_before_the_last_step(world: None) -> None:
    rates = _rates("schedule.name=cosine_plateau", "schedule.warmup_steps=4", steps=40)
    expected = {4: 4e-4, 20: 2.2e-4, 36: 4e-5, 40: 4e-5}
    assert {s: rates[s] for s in expected} == pytest.approx(expected, rel=1e-12)


def test_decay_steps_and_floor_can_be_given(world: None) -> None:
    changes = (
        "schedule.name=linear",
        "schedule.warmup_steps=0",
        "schedule.decay_steps=10",
        "schedule.min_lr_ratio=0",
    )
    rates = _rates(*changes, steps=12)
    assert rates == pytest.approx([PEAK * max(1 - s / 10, 0) for s in range(17)], rel=1e-12)


@pytest.mark.parametrize(("warmup", "expected"), [(0, [4e-4] * 4), (2, [0.0, 2e-4, 4e-4, 4e-4])])
def test_constant(world: None, warmup: int, expected: list[float]) -> None:
    rates = _rates("schedule.name=constant", f"schedule.warmup_steps={warmup}", steps=30)
    assert rates[:4] == pytest.approx(expected, rel=1e-12)
    assert rates[4:] == [PEAK] * 31


def test_a_resumed_schedule_follows_the_configuration_of_this_start(world: None) -> None:
    """Only the step is read from the checkpoint."""
    old = train_state(tiny_run("optim.lr=1e-3"))
    old.schedule.step(increment=10)
    new = train_state(
        tiny_run("optim.lr=4e-4", "schedule.name=linear", "schedule.warmup_steps=20", "train.max_steps=100")
    )
    new.schedule.load_state_dict(old.schedule.state_dict())
    assert [group["lr"] for group in new.optimizer.param_groups] == pytest.approx([2e-4, 2e-4], rel=1e-12)


def _parameters(state: TrainState) -> Iterator[tuple[str, Any]]:
    (wrapped,) = state.model
    return wrapped.module.named_parameters()


def test_only_matrices_decay_and_they_do_so_decoupled(world: None) -> None:
    """Without gradients Adam does nothing, so what remains is w (1 - lr * weight_decay) of the matrices."""
    state = train_state(tiny_run("optim.lr=0.1", "optim.weight_decay=0.5"))
    for _, parameter in _parameters(state):
        with torch.no_grad():
            parameter.fill_(2.0)
        parameter.main_grad.zero_()
    state.optimizer.step()
    values = {name: (parameter.dim(), parameter.unique().tolist()) for name, parameter in _parameters(state)}
    for name, (dimensions, value) in values.items():
        assert value == pytest.approx([2.0 * (1 - 0.1 * 0.5)] if dimensions == 2 else [2.0], rel=1e-12), name
    assert {dimensions for dimensions, _ in values.values()} == {1, 2}


def test_adam_takes_the_configured_numbers(world: None) -> None:
    """First step with gradient g: m / (sqrt v + eps) = g / (|g| + eps), so a large eps must show."""
    changes = (
        "optim.lr=0.1",
        "optim.weight_decay=0",
        "optim.eps=3",
        "optim.clip_grad=0",
        "optim.betas=[0.5,0.75]",
    )
    state = train_state(tiny_run(*changes))
    before = {name: parameter.detach().clone() for name, parameter in _parameters(state)}
    for gradient in (1.0, 4.0):
        for _, parameter in _parameters(state):
            parameter.main_grad.fill_(gradient)
        state.optimizer.step()
    # m: 0.5, 2.25 -> /0.75 = 3; v: 0.25, 4.1875 -> /0.4375
    second = 3 / (math.sqrt(4.1875 / 0.4375) + 3)
    for name, parameter in _parameters(state):
        assert torch.allclose(
            before[name] - parameter, torch.tensor(0.1 * (1 / 4 + second), dtype=torch.float64)
        ), name


@pytest.mark.parametrize(("clip_grad", "factor"), [(0.0, 1.0), (1.0, 0.2), (4.0, 0.8), (50.0, 1.0)])
def test_clipping(world: None, clip_grad: float, factor: float) -> None:
    """The norm is reported before clipping, also when nothing is clipped."""
    state = train_state(tiny_run(f"optim.clip_grad={clip_grad}"))
    parameters = dict(_parameters(state))
    for parameter in parameters.values():
        parameter.main_grad.zero_()
    parameters["lm_head.dense.bias"].main_grad[:2] = torch.tensor([3.0, 4.0], dtype=torch.float64)
    _, norm, _ = state.optimizer.step()
    assert norm == pytest.approx(5.0, rel=1e-14)
    clipped = parameters["lm_head.dense.bias"].main_grad[:2].tolist()
    # Megatron-Core adds 1e-6 to the norm before it divides.
    assert clipped == pytest.approx([3.0 * factor, 4.0 * factor], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_kept_in_fp32(world: None, precision: str) -> None:
    state = train_state(tiny_run(f"model.precision={precision}"))
    assert {parameter.main_grad.dtype for _, parameter in _parameters(state)} == {torch.float32}
    result = train_step(state, BATCHES)
    assert math.isfinite(result.grad_norm)
    assert result.grad_norm > 0


def test_bf16_weights_move_by_less_than_their_spacing(world: None) -> None:
    """The fp32 copies add up updates that a bf16 weight would lose."""
    state = train_state(tiny_run("model.precision=bf16", "optim.lr=1e-5", "optim.weight_decay=0"))
    scale = dict(_parameters(state))["encoder.final_layernorm.weight"]
    for step in range(500):
        scale.main_grad.fill_(1.0)
        state.optimizer.step()
        if step == 100:
            assert (scale == 1.0).all(), "1e-3 is below half a spacing of 2^-8 under 1"
    # Adam moves by lr per step: 1 - 500e-5 = 0.995, to the nearest bf16 below 1 (spacing 2^-8)
    assert scale.unique().tolist() == [0.99609375]


def test_gradients_are_reduced_in_the_backward_pass_of_the_last_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the second step on; in the first one it is not known yet how often each weight gets a gradient."""
    run = tiny_run("parallel.distributed_optimizer=true")
    with process_groups(run.parallel, seed=1):
        state = train_state(run)
        (wrapped,) = state.model
        (group,) = wrapped.bucket_groups
        events = []

        def tell(name: str) -> None:
            original = getattr(group, name)
            monkeypatch.setattr(group, name, lambda **settings: (events.append(name), original(**settings)))

        tell("start_grad_sync")
        tell("finish_grad_sync")
        wrapped.register_forward_pre_hook(lambda *_: events.append("forward"))
        train_step(state, BATCHES * 2)
        assert events == ["forward", "forward", "finish_grad_sync", "start_grad_sync"]
        events.clear()
        train_step(state, BATCHES * 2)
        assert events == ["forward", "forward", "start_grad_sync", "finish_grad_sync"]


def test_gradients_that_may_be_missing_are_reduced_at_the_end(world: None) -> None:
    class WithOwnHead(ESM2Model): ...

    run = tiny_run("parallel.distributed_optimizer=true")
    (model,) = build_model(run.model, run.parallel, torch.device("cpu"), run.seed)
    model.__class__ = WithOwnHead
    (wrapped,) = wrap_data_parallel([model], run.model, run.parallel)
    assert not wrapped.ddp_config.overlap_grad_reduce
