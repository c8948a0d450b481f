"""Stops all processes of a run when one of them receives a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Stops every rank after the current step once any rank gets SIGTERM or SIGUSR1, or is alarmed.

    Attributes:
        name: The signal that this rank got; None if it got none.
        stopping: Last result of `received`, the same on every rank.
        saving: Whether any rank was writing a checkpoint at that moment, the same on every rank.
    """

    def __init__(
        self,
        device: torch.device,
        alarm: Callable[[], bool] = lambda: False,
        is_saving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare the flags that the ranks share.

        Args:
            device: Device of this rank.
            alarm: Tells whether this rank has another reason to stop, for which the caller has an error.
            is_saving: Tells whether this rank is writing a checkpoint in the background.
        """
        self._alarm = alarm
        self._is_saving = is_saving
        self._flags = torch.zeros(2, dtype=torch.int32, device=device)
        self._previous: dict[int, Any] = {}
        self.name: str | None = None
        self.stopping = self.saving = False

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
        """Return whether any rank has to stop, by an all-reduce of two integers over the world.

        The other one is for `saving`, so that saves in the background need no collective of their own.
        """
        self._flags[0] = self.name is not None or self._alarm()
        self._flags[1] = self._is_saving()
        dist.all_reduce(self._flags, op=dist.ReduceOp.MAX)
        self.stopping, self.saving = (bool(flag) for flag in self._flags.tolist())
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
