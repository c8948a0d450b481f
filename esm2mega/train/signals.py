"""A signal to stop, heard by one process and obeyed by all."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist


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
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def received(self) -> bool:
        """Whether any rank got a signal. All-reduce of one integer over the world; the same answer
        everywhere.
        """
        self._flag.fill_(self.name is not None)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        self.stopping = bool(self._flag.item())
        return self.stopping
