"""Two real processes that take themselves for two hosts, with clocks and files of their own where wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import start_ranks, wait_ranks

# Arguments: seconds that the clock of rank 1 is ahead, the directory of each rank, and the kind of locks.
PROGRAM = """
import os, sys, time
import filelock
from esm2mega.cli import app
from esm2mega.doctor import hosts, run
from esm2mega.doctor.finding import Finding

rank = int(os.environ["RANK"])
ahead, *folders, locks, groups = sys.argv[1:]
if groups == "two":
    os.environ["GROUP_RANK"] = str(rank)
hosts.VISIBLE_SECONDS = 0.5
hosts.socket.gethostname = lambda: "node"
hosts.now = lambda: time.time() + rank * float(ahead)
run.check_host = lambda path, quick: [Finding("ok", "the same"), Finding("ok", f"of {rank}")]
if rank == 0:
    filelock.FileLock = getattr(filelock, locks)
sys.exit(app.main(["doctor", folders[rank]]))
"""


def report(folder: Path, ahead: float, folders: tuple[Path, Path], locks: str, groups: str) -> list[str]:
    for each in folders:
        each.mkdir(exist_ok=True)
    arguments = ["-c", PROGRAM, str(ahead), *map(str, folders), locks, groups]
    # Rank 0 ends with 1 if something failed, so the codes are not looked at.
    first, second = wait_ranks(start_ranks(arguments, 2, folder), folder, timeout=100)
    assert (second.stdout, second.stderr, first.stderr) == ("", "", "")
    assert all(not list(each.iterdir()) for each in folders)
    return first.stdout.splitlines()


@pytest.mark.distributed
def test_two_sound_hosts(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    lines = report(tmp_path / "ranks", 0, (shared, shared), "FileLock", "two")
    assert lines[:3] == ["ok       the same", "ok       node/0: of 0", "ok       node/1: of 1"]
    clock, network, files, verdict = lines[3:]
    assert clock.startswith("ok       clock of node/1: 0.0")
    assert network == "ok       gloo all-reduce between 2 hosts"
    assert files == f"ok       directory {shared} on node/1: renames and locks of node/0 are seen"
    assert verdict == "this machine can train (0 optional missing)"


@pytest.mark.distributed
def test_a_clock_and_locks_that_differ(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    lines = report(tmp_path / "ranks", 30, (shared, shared), "SoftFileLock", "two")
    clock, _, files, verdict = lines[3:]
    assert clock.startswith("FAILED   clock of node/1: 30.0") and " s ahead of node/0" in clock
    assert files.startswith(
        f"FAILED   directory {shared} on node/1: a lock that node/0 holds is free; mount it"
    )
    assert verdict.startswith("FAILED: 2 of 6 checks")


@pytest.mark.distributed
def test_directories_that_are_not_shared(tmp_path: Path) -> None:
    lines = report(tmp_path / "ranks", -3, (tmp_path / "a", tmp_path / "b"), "FileLock", "two")
    clock, _, files, _ = lines[3:]
    assert clock.startswith("warning  clock of node/1: 3.0") and " s behind node/0" in clock
    assert files.startswith(
        f"FAILED   directory {tmp_path / 'a'} on node/1: what node/0 renames is not there within"
    )


@pytest.mark.distributed
def test_two_processes_on_one_host_report_once(tmp_path: Path) -> None:
    lines = report(tmp_path / "ranks", 30, (tmp_path / "a", tmp_path / "a"), "FileLock", "one")
    assert lines == [
        "ok       the same",
        "ok       of 0",
        "ok       2 processes on one host: no clocks to compare",
        "this machine can train (0 optional missing)",
    ]
