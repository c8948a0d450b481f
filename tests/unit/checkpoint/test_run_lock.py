"""One job at a time trains in the directory of a run; a kill releases it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esm2mega.checkpoint import run_lock
from esm2mega.checkpoint.run_lock import owning
from esm2mega.errors import UserError

HOLDER = """
import sys, time
from esm2mega.checkpoint.run_lock import owning
with owning(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_job_is_refused_until_the_first_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            monkeypatch.setattr(run_lock, "_PATIENCE", 0.1)
            refused = pytest.raises(UserError, match=f"run_dir={run_dir}: another job trains in it, and .*$")
            with refused, owning(run_dir):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with owning(run_dir):
        pass
    with owning(run_dir):  # what ended normally released it too
        pass


def test_a_file_system_without_locks_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def acquire(self: object, timeout: float) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with owning(tmp_path):
        pass
    assert "this file system has no locks" in capsys.readouterr().err
