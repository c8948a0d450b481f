"""`drill` finds the same after kills as without, says what differs, and leaves no process behind."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import CheckpointConfig, DownstreamConfig, Run
from esm2mega.drill import command
from esm2mega.drill.compare import Remains, differences, unaccounted
from tests import warm
from tests.distributed.runs import SETTINGS, SHAPE

pytestmark = pytest.mark.distributed

STEPS = 8


@pytest.fixture(scope="module")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The ranks of the drill are forked; it kills the process that stands for them, and they end with it."""
    path = tmp_path_factory.mktemp("python") / "python"
    with warm.interpreter(path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(path))
        yield


def words(out: Path, store: Path, *more: str, rounds: int = 2, processes: int = 2) -> list[str]:
    options = [
        "--out",
        str(out),
        "--steps",
        str(STEPS),
        "--rounds",
        str(rounds),
        "--processes",
        str(processes),
    ]
    return ["drill", *options, "--", "pretrain", *SETTINGS, f"data.train={store}", *more]


@pytest.fixture(scope="module")
def drilled(warm_python: None, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a drill of two data-parallel ranks that has found nothing."""
    out = tmp_path_factory.mktemp("drill") / "out"
    mine = out.parent / "mine"
    (mine / "checkpoints").mkdir(parents=True)
    # Windows of 16 samples, so that the run goes through several of them.
    assert main(words(out, store, f"run_dir={mine}", "data.pack_window=16")) == 0
    assert [path.name for path in mine.rglob("*")] == ["checkpoints"], "the user's own run was touched"
    return out


def test_kills_change_nothing(drilled: Path) -> None:
    report = json.loads((drilled / "drill.json").read_text())
    assert report["equal"] and report["kills"] == 2 and not report["faults"]
    assert sum(len(run["kills"]) for run in report["runs"]) == 2
    unbroken = Remains(drilled / "unbroken")
    assert len(set(unbroken.samples)) == len(unbroken.samples) == report["samples"] > 32
    assert unbroken.weights_sha256 == report["weights_sha256"]
    assert sorted(path.name for path in drilled.iterdir()) == ["drill.json", "output", "unbroken"]


@pytest.mark.slow
def test_what_is_left_out_is_accounted_for(
    warm_python: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A protein of which the model has no finite loss; its pack is left out in every run."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -m tests.broken_protein infinite "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    fasta = tmp_path / "proteins.fasta"
    lines = [f">p{n}\n{'MKTAYIAKQR' * 4}{'O' * 9 if n == 30 else 'LLL'}\n" for n in range(60)]
    fasta.write_text("".join(lines))
    assert main(["prepare", "fasta", str(fasta), "--out", str(tmp_path / "data")]) == 0
    more = ("train.on_nonfinite=rollback", "train.max_minutes=0.001", "data.pack_window=16")
    assert main(words(tmp_path / "out", tmp_path / "data/train", *more, rounds=1, processes=1)) == 0
    assert "every sample was used or left out once" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "drill.json").read_text())
    unbroken = Remains(tmp_path / "out" / "unbroken")
    assert report["samples_left_out"] == len(unbroken.left_out) > 0
    for line in (tmp_path / "out/unbroken/incidents.jsonl").read_text().splitlines():
        assert all("p30" in pack["proteins"] for pack in json.loads(line)["packs"])
    assert not set(unbroken.left_out) & set(unbroken.samples)


def test_the_checksum_is_that_of_inspect(drilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(drilled / "unbroken")]) == 0
    assert f"weights sha256 {Remains(drilled / 'unbroken').weights_sha256}" in capsys.readouterr().out


def test_a_restart_that_changes_the_run_is_found(
    drilled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """As a resume would that loses something: here every start but the first has another weight decay.

    The training is a fine-tuning, whose model is that of `init_from`.
    """
    start = command._Machine._start

    def other(machine: command._Machine, name: str, number: int) -> command.Ranks:
        changed = command._Machine(
            machine._training,
            [*machine._settings, *["optim.weight_decay=0.5"] * (number > 1)],
            1,
            machine._out,
        )
        return start(changed, name, number)

    monkeypatch.setattr(command._Machine, "_start", other)
    labels = tmp_path / "labels.csv"
    rows = [f"{'MKTAYIAKQR' * 3}{letter}L,{number}.5" for number, letter in enumerate("ACDEFGHIKLMNPQRSTVWY")]
    labels.write_text("\n".join(["sequence,value", *rows]) + "\n")
    task = ["task.kind=regression", "task.target_columns=[value]", f"data.train={labels}"]
    task.append(f"init_from={drilled / 'unbroken'}")
    # This seed draws its first moment at a tenth of the run, where all steps are still to come.
    options = ["--out", str(tmp_path / "out"), "--steps", str(STEPS), "--rounds", "1", "--seed", "14"]
    assert main(["drill", *options, "--", "finetune", *SETTINGS[len(SHAPE) :], *task]) == 1
    report = json.loads((tmp_path / "out" / "drill.json").read_text())
    assert not report["equal"] and any(fault.startswith("weights: ") for fault in report["faults"])
    assert "UNEQUAL" in capsys.readouterr().out
    assert Path(report["runs"][-1]["run_dir"], "log.jsonl").exists(), "what differs has to stay"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("repeat a sample", "samples: 1 were used more than once"),
        ("drop a sample", "samples: 1 were not used"),
        ("take another sample", "samples: 1 do not belong to these steps"),
        ("drop a record", "log: the training records are not those of steps 1 to 8"),
        ("repeat a record", "log: the training records are not those of steps 1 to 8"),
    ],
)
def test_samples_are_accounted_for(drilled: Path, tmp_path: Path, change: str, found: str) -> None:
    shutil.copytree(drilled / "unbroken", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    action, _, what = change.split(maxsplit=2)
    second = records[1]["samples"] if what == "sample" else None
    if second is None:
        records[2:3] = [records[2]] * 2 if action == "repeat" else []
    elif action == "repeat":
        second.append(records[0]["samples"][0])
    else:
        second[:1] = [[10**6, 0]] if action == "take" else []
    log.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    changed = Remains(tmp_path / "run")
    assert any(line.startswith(found) for line in unaccounted(changed)), list(unaccounted(changed))
    assert any(line.startswith("log: ") for line in differences(Remains(drilled / "unbroken"), changed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_process(number: signal.Signals, store: Path, tmp_path: Path) -> None:
    arguments = ["-m", "esm2mega", *words(tmp_path / "drill", store)]
    process = warm.start(arguments, tmp_path / "out", tmp_path / "err")
    try:
        until = time.monotonic() + 60
        while len(ranks := psutil.Process(process.pid).children(recursive=True)) < 2:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "err").read_text()
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == 1
        said = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}[number]
        assert f"esm2mega: {said}\n" in (tmp_path / "err").read_text()
        assert not psutil.wait_procs(ranks, timeout=10)[1]
    finally:
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(("best", "metric"), [("downstream/x", "valid_loss"), ("valid_perplexity", None)])
def test_nothing_is_measured_downstream(best: str, metric: str | None) -> None:
    run = Run(downstream=DownstreamConfig(tasks=["x"]), checkpoint=CheckpointConfig(best_metric=best))
    given = dict(word.split("=", 1) for word in command.settings_of(run, STEPS))
    assert given["downstream.tasks"] == "[]" and given.get("checkpoint.best_metric") == metric
    assert "downstream.tasks" not in " ".join(command.settings_of(Run(), STEPS))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--", "embed", "x"], "drill cannot run 'embed'; give -- and pretrain or finetune"),
        (["--", "pretrain", "--code", "x"], "No such option '--code'"),
        (["--", "pretrain", "train.max_step=3"], "unknown key train.max_step; the nearest valid key is"),
        (["--steps", "0", "--", "pretrain"], "Invalid value for '--steps'"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drill", "--out", str(tmp_path / "out"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and error in err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["drill", "--out", str(tmp_path), "--", "pretrain"]) == 2
    assert "is not an empty directory, and a drill overwrites nothing" in capsys.readouterr().err


def test_what_the_training_refuses_ends_the_drill(
    warm_python: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drill", "--out", str(tmp_path / "out"), "--", "pretrain", *SETTINGS]) == 2
    assert "error: pretrain without kills: data.train is not set" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir()), "the same --out can be given again"


def test_ranks_are_started_by_the_drill_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["drill", "--out", str(tmp_path / "out"), "--", "pretrain"]) == 2
    assert "run it without torchrun or srun, with --processes N" in capsys.readouterr().err
