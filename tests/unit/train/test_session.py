"""Which weights the end of a run tests, and that one job at a time trains in a directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esm2mega.checkpoint import layout, run_lock
from esm2mega.cli.app import main
from esm2mega.errors import MachineError
from esm2mega.train.session import _best_to_load
from tests.unit.checkpoint.test_digests import flip
from tests.unit.checkpoint.test_run_lock import HOLDER
from tests.unit.conftest import TinyRun
from tests.unit.runs import tiny_run


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_best_is_set_aside_and_the_next_one_tested(
    finished: TinyRun, tmp_path: Path, world: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    run = tiny_run(run_dir=run_dir)
    best = _best_to_load(run, 99)
    assert best is not None and _best_to_load(run, best.step) is None
    flip(best.path / "model" / name, 7000)
    second = _best_to_load(run, 99)
    assert second is not None and second.value > best.value
    assert f"{best.path.name} is now {best.path}.damaged" in capsys.readouterr().err
    assert layout.find_set_aside(run_dir) == [Path(f"{best.path}.damaged")]


def test_an_unreadable_best_is_an_error(
    finished: TinyRun, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("esm2mega.checkpoint.digests.content_sha256", unreadable)
    with pytest.raises(MachineError, match="Input/output error"):
        _best_to_load(tiny_run(run_dir=finished.run_dir), 99)


def test_a_second_job_in_a_directory_is_refused_and_changes_nothing(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    log = (run_dir / "log.jsonl").read_bytes()
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.1)
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            again = ["pretrain", "--config", str(run_dir / "config.yaml"), f"run_dir={run_dir}"]
            assert main([*again, "train.max_steps=6"]) == 2
        finally:
            holder.kill()
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and f"error: run_dir={run_dir}: another job trains in it" in said
    assert (run_dir / "log.jsonl").read_bytes() == log


def test_what_a_killed_run_had_still_to_remove_is_removed(finished: TinyRun, tmp_path: Path) -> None:
    """A kill came behind the last save, so that the next start has nothing to save."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    *_, newest = layout.find_checkpoints(run_dir)[0]
    left = layout.step_dir(run_dir, 0)
    shutil.copytree(newest, left)
    again = ["pretrain", "--config", str(run_dir / "config.yaml"), f"run_dir={run_dir}"]
    assert main([*again, "checkpoint.keep_last=1", "checkpoint.keep_best=0"]) == 0
    assert layout.find_checkpoints(run_dir)[0] == [newest]
