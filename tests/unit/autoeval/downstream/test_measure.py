"""Downstream tasks of a pretraining: equal to `embed` and `probe`, without a trace in the training."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

from esm2mega.autoeval.downstream import measure as module
from esm2mega.autoeval.downstream.measure import Downstream
from esm2mega.autoeval.downstream.tables import open_tasks
from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import best_checkpoint
from esm2mega.cli.app import main
from esm2mega.config.schema import DownstreamConfig, Run
from esm2mega.errors import StoppedBySignal
from esm2mega.train.loop import LoopState, note_evaluation
from esm2mega.train.pretrain import pretrain
from tests.checkpoints import full_weights
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS, tiny_run

CLOCK = ("time", "tokens_per_second", "step_time", "memory_gb")
COUNTS = {"train": 24, "valid": 10, "test": 12}


def write_tasks(folder: Path) -> tuple[Path, Path]:
    """A task of proteins with a manifest, one of residues without; some are longer than 64 tokens."""
    rng = np.random.default_rng(5)
    letters = list("LAGVSERTIDPKQNFYMHWC")
    proteins, residues = folder / "size", folder / "helix"
    for split, count in COUNTS.items():
        rows: dict[Path, list[str]] = {proteins: [], residues: []}
        for number in range(count):
            sequence = "".join(rng.choice(letters, rng.integers(5, 90)))
            share = sum(letter in "AGLV" for letter in sequence) / len(sequence)
            helix = "".join("H" if letter in "LAEK" else "C" for letter in sequence)
            rows[proteins].append(f"{split}{number},{sequence},{share}")
            rows[residues].append(f"{split}{number},{sequence},{helix}")
        for task, lines in rows.items():
            task.mkdir(parents=True, exist_ok=True)
            (task / f"{split}.csv").write_text("\n".join(["id,sequence,target", *lines]) + "\n")
    (proteins / "manifest.json").write_text(
        json.dumps({"version": 1, "benchmark": "FLIP", "kind": "regression", "splits": {}})
    )
    (residues / "task.yaml").write_text("task:\n  kind: token_classification\n")
    return proteins, residues


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def measured(
    finished: TinyRun, tasks: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Downstream]]:
    """The run of `finished`, measured after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("measured")
    run = measured_run(finished, tasks, folder / "run")
    downstream = Downstream(run)
    pretrain(run, downstream=downstream)
    yield folder / "run", downstream


def measured_run(finished: TinyRun, tasks: tuple[Path, ...], run_dir: Path, *changes: str) -> Run:
    words = [f"data.train={finished.train}", f"data.valid={finished.valid}", "train.eval_every=2"]
    names = ",".join(map(str, tasks))
    words += ["checkpoint.save_every=1", "checkpoint.keep_last=9", f"downstream.tasks=[{names}]"]
    return tiny_run(*words, *changes, run_dir=run_dir)


def records(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    found = [{key: value for key, value in each.items() if key not in CLOCK} for each in found]
    return [each for each in found if kind in (None, each["kind"])]


def test_training_is_the_same_to_the_bit(finished: TinyRun, measured: tuple[Path, Downstream]) -> None:
    run_dir, _ = measured
    others = [record for record in records(run_dir) if record["kind"] != "downstream"]
    assert others == records(finished.run_dir)
    expected, found = (full_weights(layout.step_dir(run, 4)) for run in (finished.run_dir, run_dir))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [record["step"] for record in records(run_dir, "downstream")] == [2, 4]


def test_vectors_are_those_of_embed_and_results_those_of_probe(
    measured: tuple[Path, Downstream], tasks: tuple[Path, Path], tmp_path: Path
) -> None:
    """Both compute in fp64 and store fp32, whose last bit may be rounded otherwise."""
    run_dir, downstream = measured
    (record,) = (each for each in records(run_dir, "downstream") if each["step"] == 4)
    fasta, file = tmp_path / "all.fasta", str(tmp_path / "all.h5")
    with fasta.open("w") as stream:
        for split in COUNTS:
            for line in (tasks[0] / f"{split}.csv").read_text().splitlines()[1:]:
                stream.write(">{}\n{}\n".format(*line.split(",")))
    assert main(["embed", f"{run_dir}@step_4", str(fasta), "--out", file, "--too-long", "chunk"]) == 0
    for folder, task, vectors in zip(tasks, downstream.tasks, downstream.vectors, strict=True):
        what, metric, kind = ("pooled", "spearman", "regression")
        if task.info.per_residue:
            what, metric, kind = ("residue", "accuracy", "token_classification")
        ids = [name for split in COUNTS for name in task.splits[split].ids]
        found = (
            [vectors.residues("last", name) for name in ids]
            if task.info.per_residue
            else [vectors.vectors("last", [name]) for name in ids]
        )
        with h5py.File(file) as stored:
            expected = stored[f"{what}/layer_2"][()]
        np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=1e-6)
        out = tmp_path / folder.name
        words = ["--labels", str(folder), "--out", str(out), f"task.kind={kind}", "task.bootstrap=0"]
        assert main(["probe", file, *words]) == 0
        results = json.loads((out / "results.json").read_text())
        for split in ("valid", "test"):
            # A step of a rank correlation, or of an accuracy, is larger than 1e-3 on so few.
            assert record[f"{folder.name}/{split}_{metric}"] == pytest.approx(
                results[split][metric], abs=1e-6
            )


def test_the_best_is_that_of_the_validation_proteins(
    finished: TinyRun, tasks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of made-up results at steps 2 and 4 the first is better; no test value chooses."""
    made_up = iter([0.9, 0.1])
    monkeypatch.setattr(
        Downstream,
        "_values",
        lambda self, task, vectors, headline, undefined: (
            {"valid": (value := next(made_up)), "test": 1 - value},
            None,
        ),
    )
    run = measured_run(finished, tasks[:1], tmp_path / "run", "checkpoint.best_metric=downstream/size")
    loop = pretrain(run, downstream=Downstream(run))
    assert (loop.best_step, loop.best_value, loop.ranking) == (2, 0.9, {2: 0.9})
    state = layout.read_state(layout.step_dir(run.run_dir, 4))
    assert state["loop"]["evaluation"]["downstream/size"] == 0.1
    # An evaluation without a measurement is neither better nor worse.
    patience = loop.evaluations_without_improvement
    assert not note_evaluation(loop, {"valid_loss": 1.0}, run.train, run.checkpoint)
    assert loop.evaluations_without_improvement == patience == 1


def test_what_a_kill_left_unfinished_is_measured_again_or_said(
    finished: TinyRun,
    measured: tuple[Path, Downstream],
    tasks: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Results that are there stay, also behind records of later steps; the others depend on the step."""
    complete = [
        {name: value for name, value in record.items() if not name.startswith("helix")}
        for record in records(measured[0], "downstream")
    ]

    def resumed(missing: int, last: int) -> tuple[list[dict[str, Any]], LoopState]:
        run_dir = tmp_path / f"{missing}.{last}"
        shutil.copytree(measured[0], run_dir)
        for step in range(last + 1, 5):
            shutil.rmtree(layout.step_dir(run_dir, step))
        log = run_dir / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [line for line in lines if line["kind"] != "downstream"]
        # A result may come some steps later.
        kept += [record for record in complete if record["step"] != missing]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))
        run = measured_run(finished, tasks[:1], run_dir)
        loop = pretrain(run, downstream=Downstream(run))
        return sorted(records(run_dir, "downstream"), key=lambda record: record["step"]), loop

    assert resumed(missing=4, last=4)[0] == complete
    assert resumed(missing=9, last=2)[0] == complete
    said = "the downstream tasks of step 2 were not finished before the run ended"
    assert said not in capsys.readouterr().err
    assert resumed(missing=2, last=3)[0] == complete[1:]
    assert capsys.readouterr().err.count(said) == 1


def test_training_goes_on_while_a_head_is_fitted_even_if_that_fails(
    finished: TinyRun,
    tasks: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fit behind step 2 waits for the gradients of step 3."""
    step_3 = threading.Event()

    def failing(*_: Any) -> None:
        raise MemoryError if step_3.wait(timeout=60) else ValueError("the step waits for the fit")

    steps = itertools.count(1)

    def on_gradients(_: Any) -> None:
        if next(steps) == 3:
            step_3.set()

    monkeypatch.setattr(module, "fit_layer", failing)
    run = measured_run(finished, tasks[:1], tmp_path / "run", "train.max_steps=3")
    assert pretrain(run, on_gradients, downstream=Downstream(run)).step == 3
    found = records(tmp_path / "run", "downstream")
    assert [record["step"] for record in found] == [2, 3]
    assert found[0] == {
        "kind": "downstream",
        "step": 2,
        "size/valid_spearman": None,
        "size/test_spearman": None,
    }
    assert "size spearman: valid none, test none (not measured: MemoryError)" in capsys.readouterr().err


@pytest.mark.some(1)
@pytest.mark.parametrize(("metric", "steps"), [("downstream/size", [2, 3]), ("valid_loss", [3])])
def test_a_stop_waits_for_no_fit(
    finished: TinyRun,
    tasks: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    steps: list[int],
) -> None:
    """The fit behind step 2 lasts until the run has ended; what the next start measures again counts."""
    is_over, fit_layer = threading.Event(), module.fit_layer

    def slow(*_: Any) -> Any:
        # By then the loop waits for this: after step 2 to choose the best, or behind the last step.
        threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert is_over.wait(timeout=120)
        raise ValueError("nobody takes this")

    monkeypatch.setattr(module, "fit_layer", slow)
    changes = ("train.max_steps=3", "checkpoint.keep_best=2", f"checkpoint.best_metric={metric}")
    run = measured_run(finished, tasks[:1], tmp_path / "run", *changes)
    try:
        with pytest.raises(StoppedBySignal, match=f"after step {steps[0]}, which is saved"):
            pretrain(run, downstream=Downstream(run))
    finally:
        is_over.set()
    assert "stopping without waiting for the downstream tasks of step 2" in capsys.readouterr().err
    monkeypatch.setattr(module, "fit_layer", fit_layer)
    loop = pretrain(run, downstream=Downstream(run))
    found = records(tmp_path / "run", "downstream")
    assert [record["step"] for record in found] == steps and loop.step == 3
    if metric != "valid_loss":
        best = max(found, key=lambda record: record["size/valid_spearman"])["step"]
        chosen = best_checkpoint(run.run_dir)
        assert chosen is not None and layout.step_of(chosen.path) == best, "it is saved, too"
        assert loop.ranking == {record["step"]: record["size/valid_spearman"] for record in found}


def test_proteins_and_residues_are_chosen_by_the_seed(tasks: tuple[Path, Path]) -> None:
    settings = DownstreamConfig([str(task) for task in tasks], max_train=9, max_test=5, max_residues=30)
    for one, same, other in zip(*(open_tasks(settings, seed) for seed in (1, 1, 2)), strict=True):
        assert [len(one.splits[split]) for split in COUNTS] == [9, 5, 5]
        hashes = [
            {name: split.fingerprint for name, split in each.splits.items()} for each in (one, same, other)
        ]
        assert hashes[0] == hashes[1] and not set(hashes[0].values()) & set(hashes[2].values())
        if one.info.per_residue:
            labelled = {name: int((~split.is_missing).sum()) for name, split in one.splits.items()}
            assert labelled["train"] == 30 and labelled["valid"] == one.num_rows("valid")


def test_what_is_wrong_is_refused_before_the_start(
    finished: TinyRun, tasks: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, bare, same = tmp_path / "bad", tmp_path / "bare", tmp_path / "same" / "size"
    shutil.copytree(tasks[0], bad)
    (bad / "valid.csv").write_text("id,sequence,target\na,MKT,much\n")
    shutil.copytree(tasks[0], same)
    shutil.copytree(tasks[1], bare, ignore=shutil.ignore_patterns("task.yaml"))
    given = [f"data.train={finished.train}", f"data.valid={finished.valid}", "train.eval_every=2"]
    for words, message in (
        ([f"downstream.tasks=[{bad}]"], "valid.csv:2"),
        ([f"downstream.tasks=[{bare}]"], "does not say what is predicted"),
        ([f"downstream.tasks=[{tasks[0]},{same}]"], "has the name of another one"),
        ([f"downstream.tasks=[{tmp_path / 'absent'}]"], "no such folder"),
        ([f"downstream.tasks=[{tasks[0]}]", "train.eval_every=0"], "never evaluates"),
        ([f"downstream.tasks=[{tasks[1]}]", "downstream.memory_gb=1e-6"], "take "),
        (["checkpoint.best_metric=downstream/size"], "is not one of"),
        (
            [f"downstream.tasks=[{tasks[0]}]", "checkpoint.best_metric=downstream/siz"],
            "did you mean downstream/size",
        ),
    ):
        assert main(["pretrain", *SETTINGS, f"run_dir={tmp_path / 'run'}", *given, *words]) == 2, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines
        assert not (tmp_path / "run").exists()
