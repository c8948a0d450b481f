"""A checkpoint that appears between the starts of two ranks changes nothing on either."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from tests.checkpoints import full_weights
from tests.distributed.runs import SETTINGS, SHAPE, Outcome, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Weights stay where they were, to the last bit.
STILL = ("optim.lr=1e-300", "optim.weight_decay=0", "parallel.tensor_model_parallel_size=2")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Outcome:
    """A run of one step; and of two layers fewer, beside it, what will appear in it as step 9."""
    folder = tmp_path_factory.mktemp("earlier")
    train(folder / "other", store, {"train.max_steps": 1, "model.num_layers": 2})
    return train(folder / "run", store, {"train.max_steps": 1})


def copy_of(earlier: Outcome, folder: Path) -> tuple[Path, list[str]]:
    """The run, and the first arguments of `tests.distributed.start_checks`."""
    shutil.copytree(earlier.run_dir, folder / "run")
    shutil.copytree(layout.step_dir(earlier.run_dir.parent / "other", 1), folder / "hidden")
    newest = layout.step_dir(folder / "run", 9)
    return folder / "run", ["-m", "tests.distributed.start_checks", str(folder / "hidden"), str(newest)]


def test_both_ranks_fine_tune_from_what_rank_0_found(earlier: Outcome, tmp_path: Path) -> None:
    """Configuration and weights are those of step 1; the checkpoint that appears has another shape."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    run_dir, arguments = copy_of(earlier, tmp_path)
    rng = np.random.default_rng(6)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sequence", "value"])
        for length in rng.integers(20, 200, 40):
            table.writerow(["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length)), rng.normal()])
    given = [f"init_from={run_dir}", f"data.train={tmp_path / 'table.csv'}", f"run_dir={tmp_path / 'tuned'}"]
    given += ["task.kind=regression", "task.target_columns=[value]", "train.max_steps=1", *STILL]
    settings = [setting for setting in SETTINGS if setting not in SHAPE]
    results = run_ranks([*arguments, "finetune", *settings, *given], 2, tmp_path / "output")
    assert choose_checkpoint(run_dir).path == layout.step_dir(run_dir, 9)
    assert f"weights from {layout.step_dir(run_dir, 1)}" in results[0].stderr
    expected = full_weights(layout.step_dir(run_dir, 1))
    actual = full_weights(layout.step_dir(tmp_path / "tuned", 1))
    encoder = [name for name in actual if name.startswith(("encoder.", "embedding."))]
    assert encoder and all(torch.equal(actual[name], expected[name]) for name in encoder)


def test_both_ranks_resume_what_rank_0_found(earlier: Outcome, store: Path, tmp_path: Path) -> None:
    run_dir, arguments = copy_of(earlier, tmp_path)
    given = [f"data.train={store}", f"run_dir={run_dir}", *STILL, "train.max_steps=2"]
    results = run_ranks([*arguments, "pretrain", *SETTINGS, *given], 2, tmp_path / "output")
    assert "resumed from step_00000001 at step 1" in results[0].stderr
    expected = full_weights(layout.step_dir(earlier.run_dir, 1))
    actual = full_weights(layout.step_dir(run_dir, 2))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
