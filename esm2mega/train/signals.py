"""Stops all processes of a run when one of them receives a signal, or when the time is up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from esm2mega.train.time_limit import TimeLimit

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_NONE, _SIGNAL, _TIME = range(3)
"""Are the reasons to stop; of several the largest is told to all ranks."""


@contextmanager
def kept_from_helpers() -> Iterator[None]:
    """Block stop signals for helper processes that are started in this block, and here until its end.

    Saving a checkpoint starts helpers that write. torchrun signals whole process groups, as Slurm and shells
    can, and without its helpers a rank could not finish the checkpoint. Processes inherit blocked signals; a
    signal that this process gets in the block is handled at the end of it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignal:
    """Stops every rank after the current step once any rank gets SIGTERM or SIGUSR1, or the time is up.

    Attributes:
        name: The signal that this rank got; None if it got none.
        stopping: Last result of `received`, the same on every rank.
    """

    def __init__(self, device: torch.device, limit: TimeLimit | None = None) -> None:
        """Begin to count the time; signals are noted in the block of this object, which may come again.

        Args:
            device: Where the process groups communicate.
            limit: On rank 0, the limit of `train.max_minutes`; None for none, and on other ranks.
        """
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._previous: dict[int, Any] = {}
        self._limit = limit
        self._reason = _NONE
        self.name: str | None = None

    @property
    def stopping(self) -> bool:
        return self._reason != _NONE

    @property
    def reason(self) -> str:
        """Return what stops the run, for a reader."""
        if self._reason == _TIME:
            return "train.max_minutes"
        return self.name or "a signal to another rank"

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        if self._limit is not None:
            self._limit.go_on()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def received(self) -> bool:
        """Return whether the run is to stop, by an all-reduce of one integer over the world."""
        mine = _SIGNAL if self.name is not None else _NONE
        # Asked in any case, since it times the work between two questions.
        if self._limit is not None and self._limit.is_near():
            mine = _TIME
        self._flag.fill_(mine)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        self._reason = int(self._flag.item())
        return self.stopping

    def saving(self) -> AbstractContextManager[None]:
        """Return a block in which a checkpoint is saved, which is timed for the limit."""
        return nullcontext() if self._limit is None else self._limit.saving()
