"""The test at the end of a fine-tuning is that of its best weights, whatever layout holds the last ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.finetune.checkpoint import evaluate_task
from tests.distributed.runs import SETTINGS
from tests.ranks import run_ranks

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytestmark = pytest.mark.distributed


def _table(path: Path, seed: int, count: int) -> Path:
    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "target"])
        for length in rng.integers(20, 120, count):
            sequence = "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length))
            writer.writerow([sequence, length])
    return path


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor_model_parallel_size=2",),
        pytest.param(("parallel.pipeline_model_parallel_size=2",), marks=pytest.mark.slow),
        pytest.param(("parallel.distributed_optimizer=true",), marks=pytest.mark.slow),
    ],
)
def test_the_best_weights_are_tested(tmp_path: Path, layout: tuple[str, ...]) -> None:
    """The first step has a rate of 0, and those of the next ones ruin the weights: the first is the best."""
    tables = {
        split: _table(tmp_path / f"{split}.csv", seed, count)
        for split, seed, count in (("train", 1, 60), ("valid", 2, 12), ("test", 3, 12))
    }
    run_dir = tmp_path / "run"
    arguments = ["-m", "esm2mega", "finetune", f"run_dir={run_dir}", "task.kind=regression", *SETTINGS]
    arguments += [f"data.{split}={path}" for split, path in tables.items()]
    arguments += ["model.precision=fp64", "train.eval_every=1", "train.early_stopping.patience=2"]
    arguments += ["checkpoint.best_metric=valid_loss", "optim.lr=3", "schedule.warmup_steps=4", *layout]
    (first, _) = run_ranks(arguments, 2, tmp_path / "output")
    best, last = (choose_checkpoint(f"{run_dir}@{which}").path for which in ("best", "last"))
    assert best.name == "step_00000001" and last.name == "step_00000003"
    ending = first.stderr.splitlines()[-1]
    assert ending.startswith("stopped early: ") and str(last) in ending and str(best) in ending
    record = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])
    assert (record["kind"], record["step"]) == ("test", 1)
    of_best, of_last = (evaluate_task(path, tables["test"])["loss"] for path in (best, last))
    # In fp64, where another layout adds in another order.
    assert abs(record["test_loss"] - of_best) < 1e-10 < 1e-3 < abs(record["test_loss"] - of_last)
