"""Stops all processes of a run when one of them receives a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
    """Stops every rank after the current step once any rank gets SIGTERM or SIGUSR1, or is alarmed.

    Attributes:
        name: The signal that this rank got; None if it got none.
        stopping: Last result of `received`, the same on every rank.
    """

    def __init__(self, device: torch.device, alarm: Callable[[], bool] = lambda: False) -> None:
        """Prepare the flag that the ranks share.

        Args:
            device: Device of this rank.
            alarm: Tells whether this rank has another reason to stop, for which the caller has an error.
        """
        self._alarm = alarm
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
        """Return whether any rank has to stop, by an all-reduce of one integer over the world."""
        self._flag.fill_(self.name is not None or self._alarm())
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        self.stopping = bool(self._flag.item())
        return self.stopping


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, as a scheduler or `timeout` sends it, end a command as Ctrl-C does, which cleans up.

    For commands that train in processes of their own, which are to be ended, and files to be removed.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
