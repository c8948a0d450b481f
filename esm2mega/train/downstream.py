"""Calls, after evaluations, what measures the model besides its loss, and takes the results when ready.

What measures is handed in by whoever starts the training: it may need packages above this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from esm2mega.config.schema import Run
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.log import DOWNSTREAM, scan_log


@dataclass(frozen=True)
class Measured:
    """Holds what was measured at a step; a value that is not defined is None.

    Attributes:
        step: The step.
        record: Entries of the log.
        best: Values by the names of `checkpoint.best_metric`.
        words: Lines for the reader.
    """

    step: int
    record: Mapping[str, float | None]
    best: Mapping[str, float | None]
    words: Sequence[str]


class Measurement(Protocol):
    """Measures a model during training, without changing it or drawing a random number."""

    @property
    def banner(self) -> list[str]:
        """Return what is measured, for the start of the run."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of what is measured on; only results with the same one can be compared."""

    def begin(self, step: int, model: list[Any], ranks: Ranks, abandon: Callable[[], bool]) -> bool:
        """Do what needs the model; the rest may go on behind the training, on the main rank.

        All ranks call this together.

        Args:
            step: Finished steps.
            model: This rank's chunks; left in training mode.
            ranks: Where this process stands.
            abandon: Called now and then; True, on every rank alike, ends it.

        Returns:
            Whether it was not abandoned.
        """

    def wait(self, seconds: float) -> bool:
        """Wait on the main rank for what was begun, at most so long; return whether nothing is left to do."""

    def result(self) -> Measured | None:
        """Return the result of what was begun, once, on the main rank; None if none is ready."""

    def forget(self) -> None:
        """Drop what was begun, without waiting for its end."""


_SECONDS = 1.0
"""Is how long the ranks wait before they ask whether the run is stopped; a fit may take many minutes."""


class DownstreamHook:
    """Decides when the loop measures, and when the result is logged."""

    def __init__(
        self,
        measurement: Measurement,
        run: Run,
        model: list[Any],
        ranks: Ranks,
        log: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        """Set what is measured.

        Args:
            measurement: What measures.
            run: The configuration: how often, and whether the choice of the best waits for the result.
            model: This rank's chunks.
            ranks: Where this process stands.
            log: Takes a record of the log.
            say: Takes a line for the reader.
        """
        self._measurement, self._model, self._ranks = measurement, model, ranks
        self._log, self._say = log, say
        self._max_steps = run.train.max_steps
        self._interval = run.train.eval_every * run.downstream.every
        self._best_metric = run.checkpoint.best_metric
        self._begun: int | None = None

    def is_due(self, step: int) -> bool:
        """Return whether the evaluation of this step is followed by a measurement."""
        return step % self._interval == 0 or step == self._max_steps

    def measure(self, step: int, abandon: Callable[[], bool]) -> dict[str, Any] | None:
        """Finish what was begun before, and begin to measure; all ranks call this together.

        Args:
            step: Finished steps.
            abandon: As for `Measurement.begin`; it is also called while a result is waited for.

        Returns:
            The value of `checkpoint.best_metric` by its name, if this is what measures it, the same on every
            rank; None if the measurement was abandoned.
        """
        if not self.finish(abandon):
            return None
        self._begun = step
        if not self._measurement.begin(step, self._model, self._ranks, abandon):
            return None
        metric = self._best_metric
        if not metric.startswith(f"{DOWNSTREAM}/"):
            return {}
        return {metric: on_one_rank(lambda: self._take()[metric])} if self._wait(abandon) else None

    def poll(self) -> None:
        """Log a result that is ready."""
        self._take()

    def finish(self, abandon: Callable[[], bool]) -> bool:
        """Wait for the result of what was begun, if any, and log it; all ranks call this together.

        Returns:
            Whether it was not abandoned.
        """
        if not self._wait(abandon):
            return False
        self._take()
        return True

    def take_up(self, log: Path, step: int, last: int | None) -> dict[str, Any]:
        """Make up for a measurement that an earlier start did not finish; all ranks call this together.

        At the same step it is done again; later its weights are gone, and this is said.

        Args:
            log: The log, which the main rank reads.
            step: Step of the loop.
            last: Step of the last measurement that was begun; None if there was none.

        Returns:
            What `measure` returns; nothing where nothing is made up for.
        """
        if last is None or on_one_rank(lambda: _is_logged(log, last)):
            return {}
        if step == last:
            return self.measure(step, lambda: False) or {}
        self._say(f"the downstream tasks of step {last} were not finished before the run ended")
        return {}

    def _wait(self, abandon: Callable[[], bool]) -> bool:
        """Return True when nothing is left to fit, and False once `abandon` does, which drops it.

        Rank 0 waits and tells the others, by a broadcast over the world each time.
        """
        while not on_one_rank(lambda: self._measurement.wait(_SECONDS)):
            if abandon():
                self._measurement.forget()
                self._say(f"stopping without waiting for the downstream tasks of step {self._begun}")
                return False
        return True

    def _take(self) -> Mapping[str, float | None]:
        measured = self._measurement.result() if self._ranks.is_main else None
        if measured is None:
            return {}
        self._log({"kind": DOWNSTREAM, "step": measured.step, **measured.record})
        for line in measured.words:
            self._say(line)
        return measured.best


def _is_logged(log: Path, step: int) -> bool:
    records = scan_log(log).records
    return any(record.get("kind") == DOWNSTREAM and record.get("step") == step for record in records)
