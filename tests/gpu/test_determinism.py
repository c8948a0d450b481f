"""The same training steps twice have the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from esm2mega.config.load import load_run
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import train_state
from esm2mega.train.step import StepResult, train_step
from tests.gpu.cases import all_kernels, packed_batch
from tests.parity import references


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's deterministic algorithms; cuBLAS wants a workspace of its own for that."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.some(1)
@all_kernels
def test_the_same_steps_twice_have_the_same_bits(
    ranks: Ranks, precision: str, attention: str, deterministic: None
) -> None:
    """On CUDA that takes deterministic algorithms: otherwise attention adds its gradients in any order."""
    start, first, results = trained(ranks, precision, attention)
    _, second, again = trained(ranks, precision, attention)
    assert results == again
    assert {name for name in first if not torch.equal(first[name], second[name])} == set()
    assert {name for name in first if torch.equal(first[name], start[name])} == set()


def trained(
    ranks: Ranks, precision: str, attention: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[StepResult]]:
    """Weights before and after three steps, and what the steps report."""
    keys = {"model.precision": precision, "model.attention_backend": attention, "schedule.warmup_steps": 0}
    run = load_run("pretrain_esm2_tiny", [f"{key}={value}" for key, value in keys.items()])
    (model,) = build_model(run.model, run.parallel, ranks.device, run.seed)
    assert model.config.packed_attention == attention
    references.randomize(model)
    state = train_state(run, [model], MLMLossReduction(), ranks, None)

    def weights() -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    start = weights()
    results = [train_step(state, [packed_batch()]) for _ in range(3)]
    return start, weights(), results
