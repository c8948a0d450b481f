"""A signal before a training begins, or in any other command, ends it with one line and no traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from esm2mega.cli.app import main
from esm2mega.cli.stopped import stopped_by_signals
from tests import warm
from tests.unit.conftest import TinyRun

SHORT = "schedule.warmup_steps=1"

COMMANDS = {
    "pretrain": (
        "esm2mega.train.pretrain.open_store",
        ["pretrain", "data.train=STORE", "model.size=tiny", SHORT],
        75,
    ),
    "finetune": ("esm2mega.train.start.open_training_start", [], 75),
    "prepare": (
        "esm2mega.data.store.prepare.prepare_fasta",
        ["prepare", "fasta", "STORE/manifest.json", "--out", "OUT"],
        1,
    ),
    "embed": ("esm2mega.infer.embed.embed", ["embed", "RUN", "STORE", "--out", "OUT"], 1),
    "predict": ("esm2mega.finetune.predict.predict", ["predict", "RUN", "STORE", "--out", "OUT"], 1),
    "evaluate": ("esm2mega.convert.start_point.open_checkpoint", ["evaluate", "RUN", "--data", "STORE"], 1),
    "convert": ("esm2mega.convert.convert.convert", ["convert", "RUN", "OUT", "--to", "hf"], 1),
    "inspect": ("esm2mega.inspect.inspect_path", ["inspect", "RUN"], 1),
    "compare": ("esm2mega.autoeval.compare.compare", ["compare", "RUN", "RUN", "--data", "STORE"], 1),
    "score": (
        "esm2mega.infer.score.score_file",
        ["score", "RUN", "--sequence", "MKT", "--variants", "VARIANTS", "--out", "OUT"],
        1,
    ),
}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_one_line(
    finished: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    inner, words, code = COMMANDS[command]
    (tmp_path / "variants.csv").write_text("mutant\nM1A\n")
    (tmp_path / "labels.csv").write_text("sequence,target\nMKT,1\nMKV,2\n")
    if command == "finetune":
        inner = "esm2mega.finetune.run.read_splits"
        words = ["finetune", f"data.train={tmp_path / 'labels.csv'}", "task.kind=regression", "init_from=RUN"]
        words += [f"run_dir={tmp_path / 'run'}", "schedule.warmup_steps=1", "train.max_steps=9"]
    places = {"RUN": finished.run_dir, "STORE": finished.train, "OUT": tmp_path / "out.h5"}
    places["VARIANTS"] = tmp_path / "variants.csv"
    for key, place in places.items():
        words = [word.replace(key, str(place)) for word in words]
    if command == "pretrain":
        words += [f"run_dir={tmp_path / 'run'}"]

    def stands_here(*given: Any, **named: Any) -> None:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(5)

    monkeypatch.setattr(inner, stands_here)
    before = signal.getsignal(signal.Signals[name])
    assert main(words) == code
    assert "Traceback" not in (errors := capsys.readouterr().err)
    again = "; start the same command again to continue" if code == 75 else ""
    lines = [line for line in errors.splitlines() if line.startswith("esm2mega: stopped")]
    assert lines == [f"esm2mega: stopped by {name}{again}"]
    assert signal.getsignal(signal.Signals[name]) == before


def test_what_a_lost_signal_breaks_is_no_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As in the middle of an import in C, which forgets what was raised and leaves half a module."""

    def half_imported(*given: Any, **named: Any) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        raise AttributeError("module 'numpy' has no attribute 'intp'")

    monkeypatch.setattr("esm2mega.inspect.inspect_path", half_imported)
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "esm2mega: stopped by SIGTERM\n"


_WAITS_OUTSIDE = """
import ctypes, os, signal, sys, threading
from esm2mega.cli.app import main
import esm2mega.train.pretrain as module

def wait(*given, **named):
    # As the rendezvous does: other code, in which no handler of Python runs.
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    ctypes.CDLL(None).poll(None, 0, 60_000)  # ends early for the signal
    ctypes.CDLL(None).poll(None, 0, 60_000)

module.open_store = wait
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_waits_outside_of_python_is_ended(finished: TinyRun, tmp_path: Path) -> None:
    words = ["pretrain", f"data.train={finished.train}", "model.size=tiny", f"run_dir={tmp_path}", SHORT]
    ended = warm.run(["-c", _WAITS_OUTSIDE, *words], timeout=50)  # shorter than the second wait
    assert ended.returncode == 75
    assert ended.stderr.splitlines() == [
        "esm2mega: stopped by SIGTERM; start the same command again to continue"
    ]


def test_forked_processes_die_of_the_signal_themselves() -> None:
    told: list[str] = []
    with stopped_by_signals(told.append):
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(3)
        _, status = os.waitpid(child, 0)
        time.sleep(0.1)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert told == []


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stopped_by_signals(lambda name: None):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_the_time_limit_ends_a_training(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", f"data.train={finished.train}", "model.size=tiny", f"run_dir={tmp_path}"]
    words += ["train.max_steps=1000000", "schedule.warmup_steps=1", "train.micro_batch_tokens=1024"]
    assert main([*words, "train.global_batch_tokens=1024", "train.max_minutes=0.03"]) == 75
    assert "esm2mega: stopped by train.max_minutes after step " in capsys.readouterr().err
    assert list((tmp_path / "checkpoints").glob("step_*/COMPLETE"))
