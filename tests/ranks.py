"""Start a command as several ranks of one world, as torchrun would, and never leave a process behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import warm

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    returncode: int
    stdout: str
    stderr: str


class RanksFailed(AssertionError):
    """A rank ended badly or the time ran out; the message holds every rank's last output."""


def free_port() -> int:
    """Find a port that nobody takes until the ranks do.

    The system hands out its own from 32768 on (Linux) to every connection, so one of those would be free only
    for the moment.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000)))
            return int(probe.getsockname()[1])


Rank = warm.Process | subprocess.Popen[str]


def start_ranks(arguments: Sequence[str], world_size: int, folder: Path) -> list[Rank]:
    """Start ``python arguments`` `world_size` times with the variables of torchrun; output goes to files in
    `folder`. Options of the interpreter before the program make the processes fresh ones, else they are warm.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes: list[Rank] = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        if world_size > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        out, err = (folder / f"rank{rank}.{name}" for name in ("out", "err"))
        if arguments[0] in ("-m", "-c"):
            processes.append(warm.start(arguments, out, err, environment))
        else:
            processes.append(_fresh(arguments, out, err, environment))
    return processes


def _fresh(
    arguments: Sequence[str], out: Path, err: Path, environment: dict[str, str]
) -> subprocess.Popen[str]:
    with out.open("w") as stdout, err.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=stdout,
            stderr=stderr,
            env=environment,
            start_new_session=True,
            text=True,
        )


def wait_ranks(processes: Sequence[Rank], folder: Path, timeout: float) -> list[RankResult]:
    """Wait for all ranks; when one fails the others get a moment, then the whole process groups are ended."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        end_ranks(processes)
    return [
        RankResult(
            process.wait(),
            (folder / f"rank{rank}.out").read_text(),
            (folder / f"rank{rank}.err").read_text(),
        )
        for rank, process in enumerate(processes)
    ]


def end_ranks(processes: Sequence[Rank]) -> None:
    """End every process group that still lives, helpers of checkpoint saving included."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_ranks(
    arguments: Sequence[str], world_size: int, folder: Path, timeout: float = 180
) -> list[RankResult]:
    """Run all ranks to the end; any failure is `RanksFailed` with every rank's code and last words."""
    results = wait_ranks(start_ranks(arguments, world_size, folder), folder, timeout)
    if any(result.returncode for result in results):
        # Only one rank reports an error, and it need not be the first.
        ends = (f"rank {rank}: code {r.returncode}\n{r.stderr[-3000:]}" for rank, r in enumerate(results))
        raise RanksFailed("\n".join(ends))
    return results
