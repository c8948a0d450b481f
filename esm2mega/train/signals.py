"""Stops all processes of a run when one of them receives a signal, or when the time is up."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from esm2mega.parallel.host_copy import HostCopy
from esm2mega.parcel import Parcel
from esm2mega.processes import STOP_SIGNALS
from esm2mega.train.time_limit import TimeLimit

_NONE, _SIGNAL, _TIME = range(3)
"""Are the reasons to stop; of several the largest is told to all ranks."""


class StopSignal:
    """Stops every rank after the current step once any rank gets SIGTERM or SIGUSR1, or is alarmed.

    So does the end of the time. Signals are noted in the block of this object, which may come again.

    Attributes:
        name: The signal that this rank got; None if it got none.
        saving: Whether any rank was writing a checkpoint at the last `received`, the same on every rank.
        alarm: Tells whether this rank has another reason to stop, for which the caller has an error.
        is_saving: Tells whether this rank is writing a checkpoint in the background.
        limit: On rank 0, the limit of `train.max_minutes`; None for none, and on other ranks.
    """

    def __init__(
        self,
        device: torch.device,
        alarm: Callable[[], bool] = lambda: False,
        is_saving: Callable[[], bool] = lambda: False,
        limit: TimeLimit | None = None,
    ) -> None:
        """Let the ranks share their flags on `device`; the other arguments are attributes."""
        self.alarm = alarm
        self.is_saving = is_saving
        self.limit = limit
        self._device = device
        self._previous: dict[int, Any] = {}
        self._reason = _NONE
        self.name: str | None = None
        self.saving = False

    @property
    def stopping(self) -> bool:
        """Return the last result of `received`, the same on every rank."""
        return self._reason != _NONE

    @property
    def reason(self) -> str:
        """Return what stops the run, for a reader."""
        if self._reason == _TIME:
            return "train.max_minutes"
        return self.name or "another rank"

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        if self.limit is not None:
            self.limit.go_on()
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
        reason = _SIGNAL if self.name is not None or self.alarm() else _NONE
        # Asked in any case, since it times the work between two questions.
        if self.limit is not None and self.limit.is_near():
            reason = _TIME
        mine = torch.tensor([reason, self.is_saving()], dtype=torch.int32)
        (flags,) = Parcel.of([mine]).to(self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._reason, saving = map(int, HostCopy(flags).values())
        self.saving = bool(saving)
        return self.stopping
