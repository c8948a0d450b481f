"""Batches in proteins: every split gives one curve, and a resumed run keeps its step at another DP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esm2mega.checkpoint import layout
from tests.distributed.runs import SETTINGS, outcome
from tests.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.distributed

TOTAL = 24


def train(run_dir: Path, store: Path, world_size: int, steps: int, **train: int) -> tuple[list[float], ...]:
    """Losses, gradient norms and samples of a run in fp64."""
    settings = [text for text in SETTINGS if "batch_tokens" not in text and "max_steps" not in text]
    changes: dict[str, Any] = {f"train.{key}": value for key, value in train.items()}
    changes |= {"train.max_steps": steps, "logging.samples": True, "model.precision": "fp64"}
    arguments = ["-m", "esm2mega", "-v", "pretrain", f"run_dir={run_dir}", f"data.train={store}", *settings]
    arguments += [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    run_ranks(arguments, world_size, run_dir / "output")
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    samples = [sorted(number for number, _ in record["samples"]) for record in lines]
    assert samples == [list(range(TOTAL * step, TOTAL * (step + 1))) for step in range(steps)]
    found = outcome(run_dir)
    return found.losses, found.grad_norms


def test_one_curve_and_resume_at_another_dp(store: Path, tmp_path: Path) -> None:
    """Two processes begin, three go on, and the curve is that of one."""
    whole = train(tmp_path / "whole", store, 1, 3, micro_batch_size=4, global_batch_size=TOTAL)
    train(tmp_path / "run", store, 2, 2, micro_batch_size=3, accumulate_grad_batches=4)
    found = train(tmp_path / "run", store, 3, 3, micro_batch_size=3, accumulate_grad_batches=4)
    for mine, theirs in zip(found, whole, strict=True):
        # Rounding of fp64, in sums of another order.
        assert mine == pytest.approx(theirs, rel=1e-10, abs=0)
    saved = layout.read_config(layout.step_dir(tmp_path / "run", 3))
    assert saved.train.global_batch_size == TOTAL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "keys"),
    [
        (4, ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"]),
        (4, ["tensor_model_parallel_size=2", "sequence_parallel=true", "distributed_optimizer=true"]),
        (5, []),
    ],
)
def test_one_curve_at_larger_layouts(
    store: Path, tmp_path: Path, world_size: int, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", store, 1, 3, micro_batch_size=4, global_batch_size=TOTAL)
    monkeypatch.setattr(f"{__name__}.SETTINGS", (*SETTINGS, *(f"parallel.{key}" for key in keys)))
    if not keys:
        with pytest.raises(RanksFailed, match="24 proteins are not a multiple of data-parallel size 5"):
            train(tmp_path / "run", store, world_size, 3, micro_batch_size=4, global_batch_size=TOTAL)
        return
    found = train(tmp_path / "run", store, world_size, 3, micro_batch_size=4, global_batch_size=TOTAL)
    for mine, theirs in zip(found, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-10, abs=0)
