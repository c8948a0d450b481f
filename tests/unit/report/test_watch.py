"""`esm2mega watch`: what it says of a run's files, when it says it again, and when it ends."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.report import watch as watch_module
from esm2mega.report.log import JsonlLog
from esm2mega.report.watch import is_finished, look, standing, status, watch

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def train(step: int, seconds: float) -> dict[str, object]:
    time = (START + timedelta(seconds=seconds)).isoformat()
    values = {"loss": 2.5, "perplexity": 12.18, "lr": 4e-4, "grad_norm": 0.9}
    machine = {"tokens_per_second": 20480.0, "step_time": 0.5, "memory_gb": 1.25}
    return {"kind": "train", "step": step, **values, **machine, "time": time}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("train:\n  max_steps: 1000\n  eval_every: 100\n")
    write(tmp_path, train(100, 0), train(200, 50))
    return tmp_path


def write(run: Path, *records: dict[str, object], name: str = "log.jsonl") -> None:
    with JsonlLog(run / name) as log:
        for record in records:
            log.write(record)


def test_it_says_step_time_left_rates_and_evaluation(run: Path) -> None:
    evaluation = {
        "kind": "eval",
        "step": 200,
        "valid_loss": 2.61,
        "valid_perplexity": None,
        "eval_recipe": "ab",
    }
    write(run, {**evaluation, "time": (START + timedelta(seconds=52)).isoformat()})
    first, *rest = status(look(run), START + timedelta(seconds=60))
    # 800 steps of half a second are left.
    assert first == f"{run.name}: step 200 of 1,000 (20%), 6 min 40 s left, last record 8 s ago"
    assert rest == [
        "  training: loss 2.5, perplexity 12.18, lr 0.0004, grad_norm 0.9",
        "  machine: 20,480 residues/s, 0.5 s a step, 1.25 GB",
        "  evaluation at step 200: valid_loss 2.61, valid_perplexity not defined",
    ]


def test_incidents_are_counted(run: Path) -> None:
    incidents = [{"step": 40, "time": "t1", "policy": "skip"}, {"step": 60, "time": "t2", "policy": "skip"}]
    write(run, *incidents, name="incidents.jsonl")
    assert status(look(run), START)[-1].startswith("  incidents: 2, the last at step 60, t2; see ")


@pytest.mark.parametrize(("age", "silent"), [(240, False), (260, True)])
def test_a_run_is_silent_after_five_times_its_longest_pause(run: Path, age: int, silent: bool) -> None:
    line = status(look(run), START + timedelta(seconds=50 + age))[0]
    assert ("no record for 5 times its longest recent pause" in line) == silent


def test_records_of_earlier_versions_have_no_age(tmp_path: Path) -> None:
    write(tmp_path, {k: v for k, v in train(3, 0).items() if k != "time"})
    assert status(look(tmp_path), START)[0] == f"{tmp_path.name}: step 3"


EVALUATION = {"kind": "eval", "step": 1000, "valid_loss": 2.0}
TESTED = {"kind": "test", "step": 700, "test_loss": 2.0}
STOPPED = {"kind": "early_stop", "step": 300, "evaluations_without_improvement": 2}
SOON = START + timedelta(seconds=460)


def test_a_run_is_over_with_the_evaluation_of_its_last_step(run: Path) -> None:
    write(run, train(1000, 400))
    assert not is_finished(look(run), SOON)
    write(run, EVALUATION)
    assert is_finished(look(run), SOON)


def test_a_run_that_goes_on_with_fewer_steps_is_over(run: Path) -> None:
    (run / "config.yaml").write_text("train:\n  max_steps: 600\n  eval_every: 400\n")
    write(run, train(700, 400))
    assert not is_finished(look(run), SOON)
    write(run, {**EVALUATION, "step": 700})
    assert is_finished(look(run), SOON)


@pytest.mark.parametrize(
    ("data", "is_expected"),
    [
        ("test: there", True),
        ("split: 0.8/0.1/0.1", True),
        ("split: 0.8/0.2", False),
        ("split: fold:1/5", True),
        ("split_by: cluster:0.3\n  split: 0.8/0.2", False),
    ],
)
def test_a_run_with_test_data_is_over_when_they_are_measured(run: Path, data: str, is_expected: bool) -> None:
    config = f"train:\n  max_steps: 1000\n  eval_every: 100\ndata:\n  {data}\n"
    (run / "config.yaml").write_text(config)
    write(run, train(1000, 400), EVALUATION)
    assert is_finished(look(run), SOON) != is_expected
    write(run, TESTED)
    assert is_finished(look(run), SOON)


def test_a_continued_run_waits_for_its_own_test(run: Path) -> None:
    (run / "config.yaml").write_text("train:\n  max_steps: 2000\n  eval_every: 100\ndata:\n  test: there\n")
    write(run, train(1000, 400), EVALUATION, TESTED, train(2000, 800), {**EVALUATION, "step": 2000})
    assert not is_finished(look(run), SOON)
    write(run, {**TESTED, "step": 1900})
    assert is_finished(look(run), SOON)


def test_a_downstream_measurement_is_waited_for(run: Path) -> None:
    config = "train:\n  max_steps: 1000\n  eval_every: 100\ndownstream:\n  tasks: [gb1]\n"
    (run / "config.yaml").write_text(config)
    write(run, train(1000, 400), EVALUATION)
    assert not is_finished(look(run), SOON) and is_finished(look(run), START + timedelta(hours=1))
    write(run, {"kind": "downstream", "step": 1000, "gb1/valid_spearman": 0.5})
    assert is_finished(look(run), SOON)


def test_a_column_of_splits_may_name_a_test(run: Path) -> None:
    """Nothing that a run writes says so, so its silence does."""
    config = "train:\n  max_steps: 1000\n  eval_every: 100\ndata:\n  split_by: part\n"
    (run / "config.yaml").write_text(config)
    write(run, train(1000, 400), EVALUATION)
    assert not is_finished(look(run), SOON)
    assert is_finished(look(run), START + timedelta(hours=3))
    # All records within a second.
    (run / "log.jsonl").unlink()
    write(run, train(999, 400), train(1000, 400), EVALUATION)
    assert is_finished(look(run), START + timedelta(hours=3))


def test_early_stopping_ends_a_run(run: Path) -> None:
    write(run, train(300, 100), {**EVALUATION, "step": 300}, STOPPED)
    assert is_finished(look(run), SOON)
    assert status(look(run), START + timedelta(hours=1))[0].endswith(
        "step 300 of 1,000 (30%), stopped early, last record 58 min 20 s ago"
    )
    # It was continued with more patience.
    write(run, train(400, 150))
    assert not is_finished(look(run), SOON)
    assert "stopped early" not in status(look(run), SOON)[0]


def test_watching_says_what_changed_and_ends_with_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look finds nothing new and says nothing; no file is added."""
    steps = iter(
        [[], [train(300, 100)], [train(1000, 450), {"kind": "eval", "step": 1000, "valid_loss": 2.0}]]
    )
    monkeypatch.setattr(watch_module.time, "sleep", lambda _: write(run, *next(steps)))
    # Whether a run is silent depends on the present.
    monkeypatch.setattr(watch_module, "_silence", lambda records, now: None)
    said: list[str] = []
    watch(run, 10.0, said.append)
    assert [text.partition(": ")[2].partition(" of")[0] for text in said] == [
        "step 200",
        "step 300",
        "step 1,000",
    ]
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "log.jsonl"]


def test_a_half_written_record_waits(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(train(300, 100))[:30])
    assert "step 200 of 1,000" in status(look(run), START)[0]


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def begin(_: float) -> None:
        config = "train:\n  max_steps: 1000\n  eval_every: 0\n"
        run.mkdir()
        (run / "config.yaml").write_text(config)
        write(run, train(1000, 450))

    monkeypatch.setattr(watch_module.time, "sleep", begin)
    said: list[str] = []
    watch(run, 10.0, said.append)
    assert said[0] == f"{run}: has no log.jsonl yet; waiting for the run to begin"
    assert said[1].startswith("run: step 1,000 of 1,000 (100%), last record ") and len(said) == 2


def test_folds_on_several_machines_begin_in_any_order(tmp_path: Path) -> None:
    for fold in (10, 3):
        run = tmp_path / f"fold_{fold}"
        run.mkdir()
        split = f"data:\n  split: fold:{fold}/12\n"
        (run / "config.yaml").write_text(f"train:\n  max_steps: 1000\n  eval_every: 100\n{split}")
        write(run, train(100, 0))
    lines = standing(tmp_path, START)
    assert lines[0] == f"{tmp_path.name}: 0 of 12 folds are finished"
    assert [line.partition(":")[0] for line in lines if line.startswith("fold_")] == ["fold_3", "fold_10"]


def test_once_needs_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="give the run_dir of a run that has started"):
        standing(tmp_path, START)
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_fold_that_is_trained_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(fold: int, *records: dict[str, object]) -> None:
        run = tmp_path / f"fold_{fold}"
        run.mkdir(exist_ok=True)
        split = f"data:\n  split: fold:{fold}/3\n"
        (run / "config.yaml").write_text(f"train:\n  max_steps: 1000\n  eval_every: 100\n{split}")
        write(run, *records)

    finished = (train(1000, 400), EVALUATION, TESTED)
    steps = iter([lambda: begin(2, train(100, 0)), lambda: begin(2, *finished), lambda: begin(3, *finished)])
    monkeypatch.setattr(watch_module.time, "sleep", lambda _: next(steps)())
    monkeypatch.setattr(watch_module, "_silence", lambda records, now: None)
    begin(1, *finished)
    said: list[str] = []
    watch(tmp_path, 10.0, said.append)
    assert [[line.partition(" (")[0] for line in text.split("\n")[:2]] for text in said] == [
        [f"{tmp_path.name}: 1 of 3 folds are finished", "fold_1: step 1,000 of 1,000"],
        [f"{tmp_path.name}: 1 of 3 folds are finished", "fold_2: step 100 of 1,000"],
        [f"{tmp_path.name}: 2 of 3 folds are finished", "fold_2: step 1,000 of 1,000"],
        [f"{tmp_path.name}: 3 of 3 folds are finished", "fold_3: step 1,000 of 1,000"],
    ]
