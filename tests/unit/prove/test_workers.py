"""Jobs run side by side on the same processes; a job that fails or dies is told, and the next one runs."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from esm2mega.prove.workers import Job, Workers, serve_with


def _run(job: Job, rank: int) -> None:
    action = job.overrides[0]
    if action == "fail" and rank == 1:
        raise ValueError("two\nlines")
    if action == "die":
        print("last words", flush=True)
        os._exit(3)
    if action == "wait" or (action == "fail" and rank == 0):
        time.sleep(60)
        (job.out / "waited").touch()
    names = ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    content = [str(os.getpid()), *(f"{name}={os.environ[name]}" for name in names)]
    (job.out / f"rank{rank}").write_text("\n".join(content))


def serve_actions(connection: Connection, log: Path) -> None:
    serve_with(connection, log, _run)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def _job(folder: Path, name: str, processes: int, action: str = "write") -> Job:
    out = folder / name
    out.mkdir()
    return Job((action,), processes, out)


def test_jobs_of_all_sizes_run_on_the_same_processes(folder: Path) -> None:
    jobs = [_job(folder, f"job{n}", size) for n, size in enumerate([1, 3, 2, 1, 3])]
    with Workers(3, folder, serve_actions) as workers:
        assert dict(workers.run(jobs)) == dict.fromkeys(range(5))
    pids = set()
    for job in jobs:
        assert len(list(job.out.iterdir())) == job.processes
        for rank in range(job.processes):
            pid, *environment = (job.out / f"rank{rank}").read_text().splitlines()
            pids.add(pid)
            assert environment == [
                f"RANK={rank}",
                f"WORLD_SIZE={job.processes}",
                "CUDA_VISIBLE_DEVICES=",
                "OMP_NUM_THREADS=1",
            ]
    assert len(pids) == 3 and str(os.getpid()) not in pids
    assert "WORLD_SIZE" not in os.environ
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_failure_is_told_and_does_not_stop_the_others(folder: Path) -> None:
    """Rank 0 of the failing job would wait for a minute: it is ended."""
    jobs = [_job(folder, "fails", 2, "fail"), _job(folder, "dies", 1, "die"), _job(folder, "writes", 2)]
    with Workers(2, folder, serve_actions) as workers:
        results = dict(workers.run(jobs))
    assert results == {
        0: "rank 1: ValueError: two lines",
        1: "the process ended: last words",
        2: None,
    }
    assert not (jobs[0].out / "waited").exists()


def test_leaving_early_ends_what_runs(folder: Path) -> None:
    waiting = _job(folder, "waits", 1, "wait")
    with Workers(2, folder, serve_actions) as workers:
        for number, error in workers.run([_job(folder, "writes", 1), waiting]):
            assert (number, error) == (0, None)
            break
    assert not (waiting.out / "waited").exists()
