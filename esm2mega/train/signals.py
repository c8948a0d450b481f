"""Lets one process that hears a signal stop all of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def kept_from_helpers() -> Iterator[None]:
    """Start helper processes that no stop signal ends; this process gets its own at the end of the block.

    Saving a checkpoint starts helpers that write. torchrun signals whole process groups, as Slurm and shells
    can: without its helpers a rank could not finish the checkpoint. A signal that is blocked here is blocked
    in every process started from here.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignal:
    """SIGTERM or SIGUSR1 asks for a stop after the current step; any rank's signal stops every rank.

    Attributes:
        name: The signal that this rank got, if it did.
        stopping: The last answer of `received`, the same on every rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._previous: dict[int, Any] = {}
        self.name: str | None = None
        self.stopping = False

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def received(self) -> bool:
        """Return whether any rank got a signal.

        All-reduce of one integer over the world; the same answer everywhere.
        """
        self._flag.fill_(self.name is not None)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        self.stopping = bool(self._flag.item())
        return self.stopping
