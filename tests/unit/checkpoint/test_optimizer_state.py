"""States pass between PyTorch's Adam and the fused Adams of Transformer Engine and apex."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron.core.optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from esm2mega.checkpoint.saver import Saver
from esm2mega.checkpoint.store import load_training_state
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.step import TrainState, train_step
from tests.unit.runs import packed_batch, tiny_run, train_state

BATCHES = [packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23})]
WHOLE, SPLIT = (f"parallel.distributed_optimizer={value}" for value in ("false", "true"))
# Both compute the same update in fp32, in another order.
BOUND = 1e-6


class FusedAdam(torch.optim.Optimizer):
    """As in Transformer Engine and apex: one count of steps for each group of parameters, an integer."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, adam_w_mode: bool
    ) -> None:
        assert adam_w_mode
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in filter(lambda group: group["params"], self.param_groups):
            group["step"] = group.get("step", 0) + 1
            # It goes to a kernel that takes an integer.
            assert isinstance(group["step"], int)
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(parameter.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                mean, square = mean / (1 - beta1 ** group["step"]), square / (1 - beta2 ** group["step"])
                update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
                parameter.add_(update, alpha=-group["lr"])


@contextmanager
def fused() -> Iterator[None]:
    """Let Megatron-Core take the fused Adam, as it does by itself where it finds one."""
    found = {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True}
    with (
        patch.multiple(megatron.core.optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        patch.multiple(distrib_optimizer, **found),
    ):
        yield


def kept(state: TrainState) -> dict[str, Tensor]:
    """Weights, main weights and moments by parameter, and the count of steps, on every one of them."""
    (part,) = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    found = {name: p.detach().float().clone() for name, p in state.model[0].module.named_parameters()}
    for number, group in enumerate(part.optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            state_of = {"step": group.get("step"), **part.optimizer.state[parameter], "main": parameter}
            for key in ("step", "exp_avg", "exp_avg_sq", "main"):
                found[f"{number} {place} {key}"] = torch.as_tensor(state_of[key]).detach().float().clone()
    return found


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 0.0) -> bool:
    assert actual.keys() == expected.keys()
    off = {name for name in expected if (actual[name] - expected[name]).abs().max() > bound}
    return not off


@pytest.fixture(autouse=True)
def split_world() -> Iterator[None]:
    with process_groups(tiny_run(SPLIT).parallel, seed=1):
        yield


def saved(path: Path, *settings: str, steps: int = 2) -> TrainState:
    state = train_state(tiny_run(*settings))
    for _ in range(steps):
        train_step(state, BATCHES)
    values = {"step": steps, "valid_loss": None}
    Saver().save(path, state.model, state.optimizer, tiny_run(*settings), values)
    return state


@pytest.mark.some(3)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("before", "after"), [(WHOLE, WHOLE), (SPLIT, SPLIT), (WHOLE, SPLIT), (SPLIT, WHOLE)], ids=str
)
def test_training_goes_on_from_a_state_of_a_fused_adam(
    tmp_path: Path, precision: str, before: str, after: str
) -> None:
    settings = f"model.precision={precision}", "schedule.warmup_steps=0"
    checkpoint = tmp_path / "step_00000002"
    with fused():
        theirs = saved(checkpoint, before, *settings)
    ours = train_state(tiny_run("seed=77", after, *settings))
    load_training_state(checkpoint, ours.model, ours.optimizer)
    (part,) = getattr(ours.optimizer, "chained_optimizers", [ours.optimizer])
    assert {float(state["step"]) for state in part.optimizer.state.values()} == {2.0}
    if before == after:
        assert same(kept(ours), kept(theirs))
    # A wrong count would correct the moments otherwise: after one step by a factor of two.
    for state in (ours, theirs):
        train_step(state, BATCHES)
    weights = [
        {name: p.detach().float() for name, p in state.model[0].module.named_parameters()}
        for state in (ours, theirs)
    ]
    # Rounded to bf16 a weight may be its neighbour.
    assert same(*weights, bound=BOUND if precision == "fp32" else 2.0**-8)


@pytest.mark.parametrize("layout", [WHOLE, SPLIT])
def test_a_fused_adam_that_made_no_step_counts_from_zero(tmp_path: Path, layout: str) -> None:
    with fused():
        theirs = saved(tmp_path / "step_00000000", layout, "model.precision=fp32", steps=0)
    ours = train_state(tiny_run("seed=77", layout, "model.precision=fp32"))
    load_training_state(tmp_path / "step_00000000", ours.model, ours.optimizer)
    (part,) = getattr(ours.optimizer, "chained_optimizers", [ours.optimizer])
    assert {float(state["step"]) for state in part.optimizer.state.values()} == {0.0}
    assert torch.equal(*(state.model[0].module.lm_head.dense.weight for state in (ours, theirs)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fused_adam_goes_on_from_a_state_of_the_distributed_optimizer(
    tmp_path: Path, precision: str
) -> None:
    """In this form Megatron-Core reads the count into either."""
    settings = SPLIT, f"model.precision={precision}", "schedule.warmup_steps=0"
    ours = saved(tmp_path / "step_00000002", *settings)
    with fused():
        theirs = train_state(tiny_run("seed=77", *settings))
        load_training_state(tmp_path / "step_00000002", theirs.model, theirs.optimizer)
        assert same(kept(theirs), kept(ours))
        for state in (ours, theirs):
            train_step(state, BATCHES)
    assert same(kept(theirs), kept(ours), bound=BOUND if precision == "fp32" else 2.0**-8)
