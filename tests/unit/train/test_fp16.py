"""fp16: Megatron-Core's dynamic loss scale, its skipped steps, and its place in logs and checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.train.pretrain import pretrain
from esm2mega.train.step import train_step
from tests.checkpoints import full_tensors
from tests.unit.conftest import TinyRun
from tests.unit.runs import packed_batch, tiny_run, train_state
from tests.unit.train.test_step import Constant

BATCHES = [packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23})]
FP16 = ("model.precision=fp16", "model.attention_backend=sdpa")


def test_overflows_are_skipped_until_the_scale_fits(world: None) -> None:
    """The first overflow leaves the scale (Megatron-Core's hysteresis), each one behind it halves it."""
    reference = train_step(train_state(tiny_run()), BATCHES)
    state = train_state(tiny_run(*FP16, "optim.initial_loss_scale=65536"))
    before = [p.detach().clone() for p in state.model[0].module.parameters()]
    results = []
    while not results or results[-1].overflowed:
        unchanged = all(map(torch.equal, before, state.model[0].module.parameters()))
        results.append(train_step(state, BATCHES))
        assert unchanged
    skipped, last = len(results) - 1, results[-1]
    assert 2 <= skipped <= 10
    assert [r.loss_scale for r in results] == [65536.0, *(65536.0 / 2**n for n in range(skipped))]
    assert not any(map(torch.equal, before, state.model[0].module.parameters()))
    # The loss is that of fp64 but for the rounding of fp16, the gradient too: the scale has gone from it.
    for result in results:
        assert result.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=2e-4)
    assert last.is_finite
    assert last.grad_norm == pytest.approx(reference.grad_norm, rel=3e-3)


@pytest.mark.parametrize(
    ("loss", "scale"),
    [(Constant(1.0, math.inf), 1.0), (Constant(math.nan, 1.0), 64.0)],
    ids=["least", "loss"],
)
def test_what_a_smaller_scale_cannot_mend_is_no_overflow(world: None, loss: Constant, scale: float) -> None:
    """A gradient that is not finite at the smallest scale, and a loss that is not finite: incidents."""
    state = train_state(tiny_run(*FP16, f"optim.initial_loss_scale={scale}"))
    state.loss = loss
    result = train_step(state, BATCHES)
    assert (result.loss_scale, result.is_finite, result.overflowed) == (scale, False, False)


def test_other_precisions_have_no_scale(world: None) -> None:
    assert train_step(train_state(tiny_run("model.precision=bf16")), BATCHES).loss_scale is None


def _train(data: Path, run_dir: Path, *changes: str) -> list[dict[str, Any]]:
    settings = (*FP16, f"data.train={data}", "optim.initial_loss_scale=131072", "checkpoint.save_every=2")
    pretrain(tiny_run(*settings, "checkpoint.keep_last=9", *changes, run_dir=run_dir))
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [
        {key: record[key] for key in ("step", "loss", "grad_norm", "loss_scale", "lr")} for record in records
    ]


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a step before the first update, and across optimizers; skipped steps are no incidents."""
    whole = _train(finished.train, tmp_path / "whole", "train.max_steps=14")
    said = capsys.readouterr().err
    scales = [record["loss_scale"] for record in whole]
    skipped = sum(record["grad_norm"] is None for record in whole)
    assert 3 <= skipped <= 12
    assert scales[: skipped + 1] == [131072.0, *(131072.0 / 2**n for n in range(skipped))]
    assert "step 1: a gradient overflowed in fp16 at loss scale 131072, so the step is skipped" in said
    for optimizer in ("false", "true"):
        broken = tmp_path / f"broken_{optimizer}"
        _train(finished.train, broken, "train.max_steps=2")
        sharded = f"parallel.distributed_optimizer={optimizer}"
        assert _train(finished.train, broken, "train.max_steps=14", sharded) == whole
        assert not (broken / "incidents.jsonl").exists()
    weights = [full_tensors(layout.step_dir(tmp_path / name, 14)) for name in ("whole", "broken_false")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
