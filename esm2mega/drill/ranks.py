"""Starts the processes of a training as torchrun would, and ends them: never any other than these.

Every rank is a child of this process and leads a process group of its own, which holds the helpers that it
starts. A child that has ended keeps its number until it is waited for, and that is done last: while a signal
can be sent, the number means this child and no other process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from esm2mega.processes import end_with_parent

GRACE = 10.0
"""Seconds that ranks get to end by themselves, after SIGTERM as by torchrun, when another one was killed."""

_POLL = 0.005


class Ranks:
    """Holds the processes of one start of a training; use it as a context, which leaves none behind."""

    def __init__(self, words: Sequence[str], outputs: Sequence[Path]) -> None:
        """Describe the processes, which the context starts.

        Args:
            words: Name and arguments of the command, which ``python -m esm2mega`` runs.
            outputs: File for the output of each rank; their number is that of the ranks.
        """
        self.outputs = list(outputs)
        self.codes: dict[int, int] = {}
        self._words = list(words)
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._store: TCPStore | None = None

    def __enter__(self) -> Ranks:
        """Start the processes."""
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        count = len(self.outputs)
        if count > 1:
            # It takes the place of the store of torchrun's agent, so no port is chosen before it is opened.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "WORLD_SIZE": str(count),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        try:
            # A process that was started and not noted could not be ended.
            with _uninterrupted():
                for rank, output in enumerate(self.outputs):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                    with output.open("wb") as file:
                        self._running[rank] = subprocess.Popen(
                            [sys.executable, "-m", "esm2mega", *self._words],
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=file,
                            env={**environment, **own},
                            start_new_session=True,
                            preexec_fn=end_with_parent,
                        )
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def wait(self, seconds: float) -> bool:
        """Wait for all ranks, at most `seconds`, and return whether all have ended.

        When one has failed, the others are told, get `GRACE`, and are ended.
        """
        until = time.monotonic() + seconds
        told = False
        while True:
            for rank, process in list(self._running.items()):
                if _has_ended(process):
                    self._reap(rank)
            if not self._running:
                return True
            if not told and any(self.codes.values()):
                told, until = True, time.monotonic() + GRACE
                self._tell()
            if time.monotonic() >= until:
                if told:
                    self.end()
                return told
            time.sleep(_POLL)

    def kill(self, ranks: Sequence[int]) -> list[int]:
        """Kill some ranks and their helpers with SIGKILL; return those that had not ended by then."""
        killed = [rank for rank in ranks if rank in self._running and not _has_ended(self._running[rank])]
        # All at one moment, as when a machine is lost; they are waited for afterwards.
        for rank in killed:
            _kill_group(self._running[rank])
        for rank in killed:
            self._reap(rank)
        return killed

    def end(self) -> None:
        """Kill whatever still runs."""
        with _uninterrupted():
            self.kill(list(self._running))
            for rank in list(self._running):
                self._reap(rank)

    def _tell(self) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def _reap(self, rank: int) -> None:
        """End the helpers that a rank has left in its group, and wait for the rank, which gives its code."""
        process = self._running[rank]
        _kill_group(process)
        self.codes[rank] = process.wait()
        del self._running[rank]


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block; blocked signals would stay so in the ranks."""
    noted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a child has ended; unlike `poll`, this does not wait for it, so it keeps its number."""
    return process.returncode is not None or psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
