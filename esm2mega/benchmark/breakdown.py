"""Divides the time of training steps among what they do: data, forward, backward, optimizer, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core.pipeline_parallel import schedules

from esm2mega.benchmark.machine import synchronize
from esm2mega.benchmark.turns import spread
from esm2mega.data.stream.loader import PackStream
from esm2mega.train import step
from esm2mega.train.step import TrainState

PHASES = {
    "data": "until the micro-batches are there, and on the device",
    "forward": "model and loss",
    "backward": "gradients",
    "optimizer": "norm, clipping, update, and zeroing of gradients",
    "waiting": "until other processes are as far, and the result is on the host",
}
"""Names the parts of a step, each with what it holds; every moment belongs to one of them."""


class Phases:
    """Counts every moment for the phase that was entered last; on a GPU each border waits for the device."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._now: str | None = None
        self._since = 0.0

    def enter(self, phase: str | None) -> None:
        """End the phase that runs and begin another one; None begins none."""
        synchronize()
        now = time.perf_counter()
        if self._now is not None:
            self.seconds[self._now] += now - self._since
        self._now, self._since = phase, now


def timed_step(state: TrainState, stream: PackStream[Any], micro_batches: int) -> dict[str, float]:
    """Train one step from a stream, and return the seconds of each phase."""
    phases = Phases()
    with _borders(phases):
        phases.enter("data")
        # A training takes and sends them one by one.
        device = next(state.model[0].parameters()).device
        batches = [batch.to(device) for batch in stream.next_step(micro_batches)]
        phases.enter("optimizer")
        launched = step.launch_step(state, batches)
        phases.enter("waiting")
        launched.result()
        phases.enter(None)
    return phases.seconds


@contextmanager
def _borders(phases: Phases) -> Iterator[None]:
    """Let the phases of `launch_step` begin where its parts are called."""

    def entering(phase: str, then: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            phases.enter(phase)
            result = original(*args, **kwargs)
            phases.enter(then)
            return result

        return called

    # The schedule ends when all ranks have the gradients of all.
    with (
        patch.object(step, "run_schedule", entering("data", "optimizer", step.run_schedule)),
        patch.object(schedules, "forward_step", entering("forward", "waiting", schedules.forward_step)),
        patch.object(schedules, "backward_step", entering("backward", "waiting", schedules.backward_step)),
    ):
        yield


def breakdown(state: TrainState, stream: PackStream[Any], micro_batches: int, steps: int) -> dict[str, Any]:
    """Train some steps, and return how their time is divided; a step before them warms up.

    Returns:
        ``steps``; ``step_seconds``, a spread; ``seconds`` of each phase in a step on average; and ``shares``
        of the phases, which add up to 1.
    """
    timed_step(state, stream, micro_batches)
    found = [timed_step(state, stream, micro_batches) for _ in range(steps)]
    sums = {phase: sum(one[phase] for one in found) for phase in PHASES}
    whole = sum(sums.values())
    return {
        "steps": steps,
        "micro_batches": micro_batches,
        "step_seconds": spread([sum(one.values()) for one in found])._asdict(),
        "seconds": {phase: value / steps for phase, value in sums.items()},
        "shares": {phase: value / whole for phase, value in sums.items()},
    }
