"""The parts of a step add up to the step, and each has the time that is spent in it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.pipeline_parallel import schedules

from esm2mega.benchmark import breakdown as breakdown_module
from esm2mega.benchmark.batches import pack, random_proteins
from esm2mega.benchmark.breakdown import PHASES, breakdown, timed_step
from esm2mega.benchmark.ours import training
from esm2mega.train import step
from esm2mega.train.step import TrainState

SLOW = 0.05


class Clock:
    """A clock that only pauses move."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def state() -> Any:
    with training("tiny", ["model.precision=fp32"]) as made:
        yield made


class Stream(SimpleNamespace):
    """A stream whose batches take their time."""

    def next_step(self, count: int) -> list[Any]:
        self.clock.sleep(self.seconds)
        return [pack(random_proteins([30, 40], seed=number)) for number in range(count)]


def test_the_parts_add_up_to_the_step(state: TrainState) -> None:
    began = time.perf_counter()
    parts = breakdown(state, Stream(seconds=0, clock=time), micro_batches=2, steps=2)  # type: ignore[arg-type]
    elapsed = time.perf_counter() - began
    assert parts["seconds"].keys() == parts["shares"].keys() == PHASES.keys()
    assert sum(parts["shares"].values()) == pytest.approx(1)
    low, high = parts["step_seconds"]["low"], parts["step_seconds"]["high"]
    assert sum(parts["seconds"].values()) == pytest.approx((low + high) / 2)
    assert low + high <= elapsed  # the warm-up is not among them
    assert all(parts["shares"][phase] > 0.01 for phase in ("forward", "backward", "optimizer"))


@pytest.mark.parametrize("phase", PHASES)
def test_what_takes_longer_is_in_its_part(
    phase: str, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause is put into each part of the step in turn, by a clock that nothing else moves."""
    clock = Clock()
    monkeypatch.setattr(breakdown_module, "time", clock)
    places: dict[str, tuple[Any, str]] = {
        "forward": (step, "forward_step"),
        "backward": (schedules, "backward_step"),
        "optimizer": (step.kernels, "clip"),
        "waiting": (step.LaunchedStep, "result"),
    }
    if phase != "data":
        place, name = places[phase]
        original = getattr(place, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            clock.sleep(SLOW)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, slow)
    stream = Stream(seconds=SLOW if phase == "data" else 0, clock=clock)
    seconds = timed_step(state, stream, 1)  # type: ignore[arg-type]
    assert seconds == pytest.approx({name: SLOW if name == phase else 0 for name in PHASES})
