"""Every parallel layout trains the same model: losses, gradient norms and weights against one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import Outcome, train

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
SP = "parallel.sequence_parallel"
DISTRIBUTED_OPTIMIZER = "parallel.distributed_optimizer"
STEPS = 5
LR = 2e-3

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Tolerance:
    """Bounds against the run of one process.

    fp64 and the fp32 losses and norms are relative. The fp32 weights are absolute: Adam divides each gradient
    by its own running size, so where a gradient is rounding noise around zero the noise decides the sign of
    an update of up to lr, in each of the five steps. No smaller bound than 2 * 5 * lr holds for a single such
    weight; but they are few, so nearly all weights must agree closely as well.
    """

    fp64: float = 1e-10
    fp32_curve: float = 1e-5
    fp32_weight: float = 2 * STEPS * LR
    fp32_typical_weight: float = 1e-5
    fp32_untypical_share: float = 1e-3


TOLERANCE = Tolerance()


@dataclass(frozen=True)
class Layout:
    name: str
    world_size: int
    settings: dict[str, Any] = field(default_factory=dict)


LAYOUTS = [
    Layout("TP2", 2, {TP: 2}),
    Layout("PP2", 2, {PP: 2}),
    Layout("TP2xPP2", 4, {TP: 2, PP: 2}),
    Layout("TP2+SP", 2, {TP: 2, SP: True}),
    Layout("DP2", 2),
    Layout("PP2xVPP2", 2, {PP: 2, VPP: 2}),
]
FP32_ONLY = [
    Layout("DP2 distributed optimizer", 2, {DISTRIBUTED_OPTIMIZER: True}),
    Layout("TP2xDP2 distributed optimizer", 4, {TP: 2, DISTRIBUTED_OPTIMIZER: True}),
]


def _name(layout: Layout) -> str:
    return layout.name


@pytest.fixture(scope="module")
def fp64(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Outcome:
    return train(tmp_path_factory.mktemp("fp64") / "one", store, {"model.precision": "fp64"})


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Outcome:
    return train(tmp_path_factory.mktemp("fp32") / "one", store, {"model.precision": "fp32"})


def relative(actual: list[float], expected: list[float]) -> float:
    assert len(actual) == len(expected) == STEPS
    return max(abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True))


def train_on_curve(
    layout: Layout, precision: str, reference: Outcome, store: Path, run_dir: Path, tolerance: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train at `layout`, check the curve, and return the weights of this run and of the reference."""
    run = train(run_dir, store, {**layout.settings, "model.precision": precision}, layout.world_size)
    assert relative(run.losses, reference.losses) <= tolerance
    assert relative(run.grad_norms, reference.grad_norms) <= tolerance
    actual, expected = run.weights(STEPS), reference.weights(STEPS)
    assert actual.keys() == expected.keys()
    return actual, expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_fp64_equals_one_process(layout: Layout, fp64: Outcome, store: Path, tmp_path: Path) -> None:
    actual, expected = train_on_curve(layout, "fp64", fp64, store, tmp_path / "run", TOLERANCE.fp64)
    for name, value in expected.items():
        assert value.dtype == torch.float64, name
        difference = (actual[name] - value).abs().max() / value.abs().max()
        assert difference <= TOLERANCE.fp64, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("layout", [*LAYOUTS[:5], *FP32_ONLY], ids=_name)
def test_fp32_equals_one_process(layout: Layout, fp32: Outcome, store: Path, tmp_path: Path) -> None:
    actual, expected = train_on_curve(layout, "fp32", fp32, store, tmp_path / "run", TOLERANCE.fp32_curve)
    differences = torch.cat([(actual[name] - value).abs().flatten() for name, value in expected.items()])
    assert differences.max() <= TOLERANCE.fp32_weight
    untypical = (differences > TOLERANCE.fp32_typical_weight).double().mean().item()
    assert untypical <= TOLERANCE.fp32_untypical_share, f"{untypical:.1e} of the weights differ by more"


def test_training_changed_every_trainable_tensor(fp64: Outcome, store: Path, tmp_path: Path) -> None:
    """Equal weights prove nothing unless the steps moved all of them."""
    start = train(tmp_path / "run", store, {"model.precision": "fp64", "optim.lr": 1e-300})
    first, last = start.weights(STEPS), fp64.weights(STEPS)
    unmoved = [name for name, value in last.items() if torch.equal(value, first[name])]
    assert unmoved == ["rotary.inv_freq"]
