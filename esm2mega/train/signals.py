"""Stops all processes of a run when one of them receives a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Stops every rank after the current step once any rank gets SIGTERM or SIGUSR1.

    Attributes:
        name: The signal that this rank got; None if it got none.
        stopping: Last result of `received`, the same on every rank.
        saving: Whether any rank was writing a checkpoint at that moment, the same on every rank.
    """

    def __init__(self, device: torch.device, is_saving: Callable[[], bool] = lambda: False) -> None:
        """Prepare to stop.

        Args:
            device: Where the collectives of the run are.
            is_saving: Tells whether this rank is writing a checkpoint in the background.
        """
        self._flags = torch.zeros(2, dtype=torch.int32, device=device)
        self._is_saving = is_saving
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
        """Return whether any rank got a signal, by an all-reduce of two integers over the world.

        The other one is for `saving`, so that saves in the background need no collective of their own.
        """
        self._flags[0], self._flags[1] = self.name is not None, self._is_saving()
        dist.all_reduce(self._flags, op=dist.ReduceOp.MAX)
        self.stopping, self.saving = (bool(flag) for flag in self._flags.tolist())
        return self.stopping
