"""Adapters trained with a head: the same at every layout, through a kill, and in predictions."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.prove.compare import Outcome
from esm2mega.prove.layouts import Layout
from esm2mega.prove.prover import Prover
from esm2mega.prove.trials import ADAPTABLE, GROUPS, HEADS, Trial
from tests.checkpoints import full_tensors
from tests.distributed.runs import SETTINGS, kill_after_step_5, train
from tests.ranks import run_ranks

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def test_adapters_and_heads_equal_one_process(prover: Prover) -> None:
    """One layout for each head, in turn; `esm2mega prove --layouts lora-heads` has all combinations."""
    rows = GROUPS["lora-heads"]
    of_head = [[t for t in rows if t.label.startswith(f"head {head},")][:4] for head in ADAPTABLE]
    # One layout is impossible for the regression on attention maps.
    assert all(len(trials) >= 3 for trials in of_head)
    trials = [trials[number % len(trials)] for number, trials in enumerate(of_head)]
    trials += [trial for trial in rows if trial.processes == 4 or len(trial.layouts) == 2]
    # Adapters in the last stage alone, which the distributed optimizer cannot have.
    last = ("finetune.mode=lora", "lora.rank=3", "lora.target_modules=['*.4.*.linear_q']")
    bare = Trial((Layout(pp=2, packed=2),), "fp64", (*HEADS["mlp"], *last), "last stage", continues=True)
    refused = replace(bare, layouts=(Layout(pp=2, dp=2, packed=2, distributed_optimizer=True),))
    for verdict in list(prover.judge([*trials, bare, refused])):
        if verdict.trial == refused:
            assert "leaves a pipeline stage without weights to train" in str(verdict.error)
            continue
        assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
        assert verdict.passed, f"{verdict.trial}: {verdict.largest.value:.1e} in {verdict.largest}"
        reference = prover.reference(verdict.trial)
        assert isinstance(reference, Outcome)
        (rank,) = reference.ranks
        last = rank["gradients"][-1]
        # Equal numbers prove nothing unless both factors and the head have gradients, and nothing else.
        assert {name.rpartition(".")[2] for name in last if "_lora." in name} == {"lora_A", "lora_B"}
        assert any(name.startswith("head.") for name in last)
        assert all("_lora." in name or name.startswith("head.") for name in last)
        # Attention maps of the last layer follow from its q and k alone.
        read = ("linear_q_", "linear_k_") if "attention_maps" in str(verdict.trial) else ("_lora.",)
        adapted = [name for name in last if "_lora." in name and any(part in name for part in read)]
        assert adapted and all(last[name][3].abs().max() > 1e-9 for name in adapted)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A pretrained model in fp64."""
    settings = {"model.precision": "fp64", "train.max_steps": 2}
    return train(tmp_path_factory.mktemp("base") / "run", store, settings).run_dir


def _table(path: Path) -> Path:
    rng = np.random.default_rng(5)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "target"])
        for length in rng.integers(20, 250, 40):
            sequence = "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length))
            writer.writerow([sequence, sequence.count("K") / length])
    return path


def test_a_killed_run_goes_on_and_predicts_at_another_layout(base: Path, tmp_path: Path) -> None:
    table, run_dir = _table(tmp_path / "train.csv"), tmp_path / "run"
    arguments = ["-m", "esm2mega", "finetune", f"init_from={base}", f"data.train={table}", *SETTINGS]
    arguments += ["task.kind=regression", "finetune.mode=lora", "lora.rank=4", "lora.dropout=0.1"]
    arguments += ["model.precision=fp64", "train.max_steps=30", "checkpoint.save_every=5"]
    arguments += ["checkpoint.keep_last=9"]
    run_ranks([*arguments, f"run_dir={tmp_path / 'whole'}"], 1, tmp_path / "unbroken")
    kill_after_step_5([*arguments, f"run_dir={run_dir}"], run_dir, tmp_path / "killed", seconds=240)
    last = "step_00000030"
    assert not (run_dir / "checkpoints" / last).exists(), "the run was too fast to be killed between"
    run_ranks([*arguments, f"run_dir={run_dir}"], 1, tmp_path / "resumed")
    expected = full_tensors(tmp_path / "whole" / "checkpoints" / last)
    actual = full_tensors(run_dir / "checkpoints" / last)
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []

    found = []
    for name, size, layout in (
        ("one", 1, []),
        ("two", 2, ["parallel.tensor_model_parallel_size=2"]),
        ("four", 4, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]),
    ):
        out = tmp_path / f"{name}.csv"
        words = ["-m", "esm2mega", "predict", str(run_dir), str(table), "--out", str(out), *layout]
        run_ranks(words, size, tmp_path / name)
        found.append(np.array([float(row["target"]) for row in csv.DictReader(out.open())]))
    assert len(found[0]) == 40 and found[0].std() > 1e-6
    for values in found[1:]:
        assert np.abs(values - found[0]).max() < 1e-10 * np.abs(found[0]).max()
