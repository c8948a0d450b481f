"""The clock of the log: literal times, and standing still."""

from __future__ import annotations

import os

import psutil
import pytest

from esm2mega.train import throughput
from esm2mega.train.throughput import Throughput, memory_gb
from tests.unit.runs import CPU


class Clock:
    """A clock that tests set."""

    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    return clock


def test_lap_is_the_mean_since_the_last(clock: Clock) -> None:
    meter = Throughput(step=10)
    clock.now += 8.0
    lap = meter.lap(step=14, tokens=600, computed_tokens=800, residues=560)
    assert (lap.step_time, lap.tokens_per_second, lap.pack_fill) == (2.0, 70.0, 0.75)
    clock.now += 1.0
    lap = meter.lap(step=15, tokens=200, computed_tokens=200, residues=190)
    assert (lap.step_time, lap.tokens_per_second, lap.pack_fill) == (1.0, 190.0, 1.0)


def test_pauses_do_not_count(clock: Clock) -> None:
    meter = Throughput(step=0)
    clock.now += 1.0
    for _ in range(2):
        with meter.paused():
            clock.now += 50.0
    clock.now += 1.0
    assert meter.lap(step=1, tokens=100, computed_tokens=100, residues=96).step_time == 2.0


def test_memory_is_that_of_this_process() -> None:
    assert memory_gb(CPU) == pytest.approx(psutil.Process(os.getpid()).memory_info().rss / 1e9, rel=0.1)
