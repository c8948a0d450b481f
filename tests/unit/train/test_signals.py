"""A signal asks for a stop; it does not end the process, and only while the loop listens."""

from __future__ import annotations

import os
import signal

import pytest

from esm2mega.train.signals import StopSignal
from tests.unit.runs import CPU


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_noted(world: None, number: signal.Signals) -> None:
    with StopSignal(CPU) as stop:
        assert not stop.received()
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.received()
        assert stop.received(), "asked again it is still true"
        assert stop.name == number.name


def test_handlers_are_given_back(world: None) -> None:
    def own(number: int, frame: object) -> None: ...

    previous = signal.signal(signal.SIGUSR1, own)
    try:
        with StopSignal(CPU):
            assert signal.getsignal(signal.SIGUSR1) is not own
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        signal.signal(signal.SIGUSR1, previous)
