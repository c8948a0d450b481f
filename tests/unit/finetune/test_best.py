"""The best weights of a fine-tuning are tested and used, by every command; a resume takes the last ones."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import esm2mega
from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.finetune.api import TrainedModel, infer_model, train_model
from esm2mega.finetune.checkpoint import evaluate_task
from tests.checkpoints import full_tensors, put_state
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(8)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(4, 60, 50)]
PAIRS = [(sequence, sequence.count("K") + len(sequence) / 10) for sequence in SEQUENCES]
TRAIN, VALID, TEST = PAIRS[:30], PAIRS[30:40], PAIRS[40:]
# The first step has a rate of 0, and those of the next ones ruin the weights: the first step is the best.
RUIN = ("optim.lr=3", "schedule.warmup_steps=6")
LORA = ("finetune.mode=lora", "lora.rank=2")


def train(run_dir: Path, *overrides: str, **given: Any) -> TrainedModel:
    """Evaluate after every step; out of patience after step 4."""
    settings = [*SETTINGS, f"run_dir={run_dir}", "task.kind=regression", "train.eval_every=1"]
    settings += ["train.max_steps=9", "train.early_stopping.patience=3", "checkpoint.best_metric=valid_loss"]
    settings += [*RUIN, *overrides]
    return train_model(settings, **{"train": TRAIN, "valid": VALID, "test": TEST, **given})


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def step(path: str | Path) -> int:
    return layout.step_of(Path(path))


@dataclass(frozen=True)
class Tuned:
    """Runs whose best step is 1 and whose last is 4: read them, do not write into them."""

    whole: TrainedModel
    adapters: TrainedModel

    def run_dir(self, which: str) -> Path:
        return Path(getattr(self, which).run.run_dir)


@pytest.fixture(scope="module")
def tuned(finished: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    base = f"init_from={finished.run_dir}"
    return Tuned(train(folder / "whole"), train(folder / "adapters", *LORA, base))


@pytest.mark.parametrize("which", ["whole", "adapters"])
def test_a_run_ends_with_the_test_of_its_best_weights(tuned: Tuned, which: str) -> None:
    """The numbers are those of `evaluate` on the best, the saved state is that of the last step."""
    trained, run_dir = getattr(tuned, which), tuned.run_dir(which)
    assert (step(trained.checkpoint), step(trained.last_checkpoint)) == (1, 4)
    (record,) = records(run_dir, "test")
    assert record["step"] == 1
    of_best, of_last = (evaluate_task(f"{run_dir}@{x}", TEST) for x in ("best", "last"))
    assert record["test_loss"] == of_best["loss"] == trained.metrics["test_loss"]
    assert record["test_mse"] == of_best["mse"] != of_last["mse"]
    evaluations = {record["step"]: record["valid_loss"] for record in records(run_dir, "eval")}
    assert trained.metrics["valid_loss"] == evaluations[1] == min(evaluations.values())
    state = layout.read_state(trained.last_checkpoint)
    assert state["loop"]["test_loss"] == record["test_loss"] and state["valid_loss"] == evaluations[4]


@pytest.mark.parametrize("which", ["whole", "adapters"])
def test_its_result_is_that_of_evaluate(tuned: Tuned, which: str, tmp_path: Path) -> None:
    """With every prediction; nothing but the name of the table differs, and which metrics have intervals."""
    run_dir, out = tuned.run_dir(which), tmp_path / "evaluated.json"
    evaluate_task(run_dir, TEST, out)
    expected, found = json.loads(out.read_text()), json.loads((run_dir / "test.json").read_text())
    assert found.pop("data") == "data.test" and expected.pop("data") == "data"
    every = expected.pop("intervals")
    assert found.pop("intervals") == {"spearman": every["spearman"]} and {"mse", "rmse"} <= every.keys()
    assert found == expected
    assert found["step"] == 1 and found["checkpoint"] == str(layout.step_dir(run_dir, 1))
    assert len(found["predictions"]) == len(TEST)


def test_the_last_line_names_both(tuned: Tuned, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(tuned.run_dir("whole"), run_dir)
    best, last = (layout.step_dir(run_dir, number) for number in (1, 4))
    value = records(run_dir, "eval")[0]["valid_loss"]
    words = f"; best by valid_loss ({value:.4f}): step 1, checkpoint {best}"
    train(run_dir)
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == f"stopped early: no improvement in 3 evaluations; step 4, checkpoint {last}{words}"
    # A resume alone goes on from the last weights, and ends with the test of the best ones again.
    weights = full_tensors(last)
    changes = ("train.max_steps=5", "train.early_stopping.patience=0", "optim.lr=1e-30")
    train(run_dir, *changes, "schedule.warmup_steps=0")
    said = capfd.readouterr().err.splitlines()
    assert any(f"run      {run_dir}, resumed from step_00000004 at step 4" == line for line in said)
    assert said[-1] == f"done: step 5, checkpoint {layout.step_dir(run_dir, 5)}{words}"
    after = full_tensors(layout.step_dir(run_dir, 5))
    names = [name for name in weights if not name.startswith("optimizer.")]
    assert all(torch.allclose(after[name], weights[name], rtol=0, atol=1e-20) for name in names)
    assert not torch.equal(after["head.output.weight"], full_tensors(best)["head.output.weight"])
    assert [record["step"] for record in records(run_dir, "test")] == [1, 1]
    train(run_dir, *changes, "schedule.warmup_steps=0")
    done = f"nothing to do: step 5 of 5 is done, checkpoint {layout.step_dir(run_dir, 5)}"
    assert capfd.readouterr().err.splitlines()[-1] == done + words


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints whose configuration is read."""
    found: list[Path] = []
    original = layout.read_config

    def read_config(checkpoint: Path) -> Any:
        found.append(checkpoint)
        return original(checkpoint)

    monkeypatch.setattr(layout, "read_config", read_config)
    return found


def commands(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """A name for each way to name a run -> the run, and the command, in which RUN stands for its name."""
    fasta, table, peft = folder / "x.fasta", folder / "x.csv", folder / "peft"
    settings = [*SETTINGS, "task.kind=regression", f"data.train={table}", "train.max_steps=1"]
    settings = [setting for setting in settings if not setting.startswith("model.")]
    tune = ["finetune", *settings, f"run_dir={folder / 'new'}", "init_from=RUN"]
    lora = [*LORA, "lora.target_modules=[linear_q]"]
    return {
        "predict": ("whole", ["predict", "RUN", str(fasta), "--out", str(folder / "p.csv")]),
        "evaluate": ("whole", ["evaluate", "RUN", "--data", str(table), "task.bootstrap=2"]),
        "compare": ("whole", ["compare", "RUN", "RUN@step_1", "--data", str(table), "task.bootstrap=2"]),
        "embed": ("whole", ["embed", "RUN", str(fasta), "--out", str(folder / "e.h5")]),
        "convert": ("whole", ["convert", "RUN", str(folder / "c"), "--to", "esm2mega", "--verify"]),
        "inspect": ("whole", ["inspect", "RUN"]),
        "init_from": ("whole", tune),
        "load_head": ("whole", [*tune, "finetune.load_head=true"]),
        "base of adapters": ("whole", [*tune, *lora, "finetune.load_head=true"]),
        "predict adapters": ("adapters", ["predict", "RUN", str(fasta), "--out", str(folder / "a.csv")]),
        "merge": ("adapters", ["lora", "merge", "RUN", "--out", str(folder / "m")]),
        "export": ("adapters", ["lora", "export", "RUN", "--out", str(peft)]),
        "resume": ("whole", [*tune[:-1], "checkpoint.resume=RUN"]),
    }


NAMES = [name for name in commands(Path()) if name != "resume"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.fasta").write_text("".join(f">p{n}\n{s}\n" for n, (s, _) in enumerate(TEST)))
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["sequence", "target"], *TEST])
    return tmp_path


@pytest.mark.some(6)
@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_the_best_of_a_run_and_says_so(
    tuned: Tuned, folder: Path, opened: list[Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    which, command = commands(folder)[name]
    run_dir = tuned.run_dir(which)
    code = main([word.replace("RUN", str(run_dir)) for word in command])
    said = capfd.readouterr().err
    assert code == 0, said
    best, last = (layout.step_dir(run_dir, number) for number in (1, 4))
    (line,) = [line for line in said.splitlines() if line.startswith("esm2mega: ") and "@last" in line]
    assert line.startswith(f"esm2mega: {run_dir}: step 1, its best by valid_loss (") and str(best) in line
    assert best in opened and last not in opened
    if name == "predict":
        rows = list(csv.DictReader((folder / "p.csv").open()))
        expected = infer_model(tuned.whole.checkpoint, [sequence for sequence, _ in TEST])
        assert [float(row["target"]) for row in rows] == expected
    if name == "convert":
        target, source = full_tensors(folder / "c"), full_tensors(best)
        assert all(torch.equal(value, source[key]) for key, value in target.items())


@pytest.mark.parametrize(
    ("name", "which", "number"),
    [
        *(("inspect", x, n) for x, n in (("best", 1), ("last", 4), ("step_4", 4), ("step_00000001", 1))),
        *((name, "last", 4) for name in ("evaluate", "base of adapters", "merge")),
        ("resume", "best", 1),
    ],
)
def test_every_command_takes_the_one_that_is_named(
    tuned: Tuned,
    folder: Path,
    opened: list[Path],
    capfd: pytest.CaptureFixture[str],
    name: str,
    which: str,
    number: int,
) -> None:
    kind, command = commands(folder)[name]
    run_dir = tuned.run_dir(kind)
    words = [word.replace("RUN", f"{run_dir}@{which}") for word in command]
    if name == "resume":
        words += ["train.max_steps=5", f"data.train={folder / 'train.csv'}"]
        words += [setting for setting in SETTINGS if setting.startswith("model.")]
        with (folder / "train.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["sequence", "target"], *TRAIN])
    code = main(words)
    said = capfd.readouterr()
    assert code == 0, said.err
    meant, other = (layout.step_dir(run_dir, x) for x in (number, 5 - number))
    assert meant in opened and other not in opened
    assert f"esm2mega: {run_dir}@{which}: " in said.err and str(meant) in said.err
    if name == "inspect":
        assert f"checkpoint {meant} (" in said.out and "; the best by valid_loss (" in said.out


def test_score_takes_the_one_that_is_named_and_of_a_pretraining_the_last(
    finished: TinyRun, tmp_path: Path, opened: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """A fine-tuned run has no scores, whichever checkpoint of it."""
    run_dir, written = tmp_path / "run", {}
    shutil.copytree(finished.run_dir, run_dir)
    path = layout.step_dir(run_dir, 2) / layout.STATE
    state = json.loads(path.read_text())
    state["loop"]["evaluation"]["valid_loss"] = 0.5
    put_state(path.parent, state)
    for name, number in (("", 4), ("@last", 4), ("@best", 2), ("@step_2", 2), ("@step_4", 4)):
        opened.clear()
        command = ["score", f"{run_dir}{name}", "--sequence", "MKTAY", "--strategy", "wt-marginals"]
        assert main([*command, "--out", str(tmp_path / f"{name}.csv")]) == 0
        (line,) = [
            x for x in capfd.readouterr().err.splitlines() if x.startswith(f"esm2mega: {run_dir}{name}:")
        ]
        assert str(layout.step_dir(run_dir, number)) in line and ("@best is step 2" in line) == (
            name in ("", "@last")
        )
        assert set(opened) == {layout.step_dir(run_dir, number)}
        written[name] = (tmp_path / f"{name}.csv").read_text()
    assert written[""] == written["@last"] == written["@step_4"] != written["@best"] == written["@step_2"]


def test_a_path_to_resume_means_its_last(
    tuned: Tuned, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a directory of its own the run looks for a best of its own."""
    run_dir = folder / "new"
    changes = ("train.max_steps=7", f"checkpoint.resume={tuned.run_dir('whole')}")
    trained = train(run_dir, *changes, "train.early_stopping.patience=0")
    assert "resumed from step_00000004 at step 4" in capfd.readouterr().err
    values = {record["step"]: record["valid_loss"] for record in records(run_dir, "eval")}
    assert step(trained.checkpoint) == min(values, key=lambda number: values[number])


def test_names_from_python(tuned: Tuned, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir, sequences = tuned.run_dir("whole"), [sequence for sequence, _ in TEST[:3]]
    best, last = (infer_model(path, sequences) for path in (tuned.whole.checkpoint, f"{run_dir}@last"))
    assert infer_model(run_dir, sequences) == best != last
    capfd.readouterr()
    with esm2mega.load(f"{run_dir}@step_4") as model:
        assert f"esm2mega: {run_dir}@step_4: {layout.step_dir(run_dir, 4)}" in capfd.readouterr().err
        assert np.isfinite(model.embed(sequences, pooling="mean")).all()


@pytest.mark.parametrize(
    ("changes", "given", "reason"),
    [
        (("checkpoint.keep_best=0",), {}, "it keeps no best (checkpoint.keep_best=0)"),
        (
            ("train.eval_every=0", "train.early_stopping.patience=0"),
            {"valid": None},
            "none of its checkpoints has a valid_loss",
        ),
    ],
)
def test_without_a_best_the_last_is_taken_and_said(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changes: tuple[str, ...],
    given: dict[str, Any],
    reason: str,
) -> None:
    trained = train(tmp_path, "train.max_steps=3", "schedule.warmup_steps=2", *changes, **given)
    assert step(trained.checkpoint) == 3 and [x["step"] for x in records(tmp_path, "test")] == [3]
    ending = capfd.readouterr().err.splitlines()[-1]
    not_kept = ending.endswith("step 1, not kept (checkpoint.keep_best=0)")
    assert ending.startswith(f"done: step 3, checkpoint {trained.checkpoint}") and not_kept == (not given)
    found = evaluate_task(tmp_path, TEST)
    assert found["step"] == 3 and found["loss"] == trained.metrics["test_loss"]
    assert f"esm2mega: {tmp_path}: step 3, its last: {trained.checkpoint}; {reason}" in capfd.readouterr().err


def test_another_metric_decides_what_is_best(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also when to stop; a resume that changes it compares anew."""
    settings = ("checkpoint.keep_best=2", "optim.lr=3e-2", "schedule.warmup_steps=2")
    trained = train(tmp_path, *settings, "train.max_steps=4", "checkpoint.best_metric=valid_spearman")
    values = {record["step"]: record["valid_spearman"] for record in records(tmp_path, "eval")}
    ranked = sorted(values, key=lambda number: (-values[number], number))
    assert step(trained.checkpoint) == ranked[0]
    there = {layout.step_of(path) for path in layout.find_checkpoints(tmp_path)[0]}
    assert set(ranked[:2]) <= there
    value = values[ranked[0]]
    assert f"by valid_spearman ({value:.4f})" in capfd.readouterr().err.splitlines()[-1]
    train(tmp_path, *settings, "train.max_steps=5", "checkpoint.best_metric=valid_mse")
    assert "checkpoint.best_metric valid_spearman -> valid_mse" in capfd.readouterr().err
    state = layout.read_state(choose_checkpoint(tmp_path, resuming=True).path)
    assert list(state["loop"]["ranking"]) == ["5"] and state["loop"]["best_step"] == 5
    with pytest.raises(UserError, match="best_metric=accuracy is not one of valid_loss, valid_mse, "):
        train(tmp_path / "wrong", "checkpoint.best_metric=accuracy")
