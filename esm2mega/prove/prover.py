"""Runs trials on worker processes, and judges them against the training of one process."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from esm2mega.config.scalars import as_word
from esm2mega.errors import MachineError, UserError
from esm2mega.prove.compare import (
    EXPORT,
    KINDS,
    Difference,
    Outcome,
    differences,
    without_metrics,
    worst,
)
from esm2mega.prove.exports import export_differences
from esm2mega.prove.layouts import Layout
from esm2mega.prove.training import MIXED, SAVED, STEPS, settings, write_stores
from esm2mega.prove.trials import Trial
from esm2mega.prove.workers import Job, Serve, Workers

FP64_BOUND = 1e-10
"""Bounds the relative difference in fp64, where rounding leaves about 1e-14 after six steps."""

HALF_BOUND = 8.0
"""Bounds the distance of a bf16 (fp16) run to the fp32 run, in units of that of the one-process run.

Both distances come from the same rounding in another order: they are alike in size, though single numbers
need not be.
"""

HALF_YARDSTICKS = {
    "bf16": {"loss": 2e-3, "gradient norm": 2e-2, "gradient": 0.5},
    "fp16": {"loss": 2.5e-4, "gradient norm": 2.5e-3, "gradient": 0.0625},
}
"""Bounds the distance of the one-process run itself at the first two steps, before the weights move.

Measured in bf16 over seeds and micro-batches: 3e-4, 2e-3 and 0.22, the last in the tensor with the smallest
numbers. fp16 rounds an eighth of that.
"""

_FP32_ROUNDING = 1e-6
"""Gives the smallest unit of such a distance, since some numbers of such a run are computed in fp32."""


@dataclass(frozen=True)
class Leg:
    """Describes one start of a training: the part of a trial that one set of processes runs.

    Attributes:
        layout: Layout of the processes.
        precision: As in `Trial`.
        settings: As in `Trial`.
        stop: Step at which the leg ends.
        after: Leg that this one resumes; None for a new run.
        base: Leg from whose final weights this one starts; None for random weights.
        code: As in `Trial`.
    """

    layout: Layout
    precision: str
    settings: tuple[str, ...]
    stop: int = STEPS
    after: Leg | None = None
    base: Leg | None = None
    code: str = ""


@dataclass(frozen=True)
class Verdict:
    """Says how a trial ended.

    Attributes:
        trial: The trial.
        bound: Largest difference that is allowed.
        worst: Largest difference of each kind, in the units of `bound`; empty after an error.
        error: Why there is nothing to compare; None if there is.
    """

    trial: Trial
    bound: float
    worst: tuple[Difference, ...] = ()
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and self.largest.value <= self.bound

    @property
    def largest(self) -> Difference:
        return worst(self.worst)


class Prover:
    """Runs trials of one seed; use it as a context, which starts and ends the processes."""

    def __init__(self, processes: int, seed: int, serve: Serve | None = None) -> None:
        """Set the seed and the processes.

        Args:
            processes: Largest number of processes.
            seed: Seed of weights, data and masks.
            serve: See `esm2mega.prove.workers.Workers`.
        """
        self.seed = seed
        self._processes = processes
        self._serve = serve
        self._stack = ExitStack()
        self._references: dict[Leg, Outcome | str] = {}
        self._numbers = 0

    def __enter__(self) -> Prover:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esm2mega_prove_")))
            self._stores = write_stores(self._folder)
            self._workers = stack.enter_context(Workers(self._processes, self._folder, self._serve))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def judge(self, trials: Sequence[Trial]) -> Iterator[Verdict]:
        """Run trials, none of which needs more than the number of processes.

        Yields:
            The verdict on each trial as it ends, in no fixed order.
        """
        needed = {leg for trial in trials for leg in [*_references(trial), *_first_legs(trial)]}
        bases = {leg.base for leg in needed if leg.base is not None}
        for legs in (bases, needed):
            for leg, outcome in self._run(leg for leg in legs if leg not in self._references):
                self._references[leg] = outcome
        finals: dict[Leg, list[Trial]] = {}
        for trial in trials:
            finals.setdefault(_final(trial), []).append(trial)
        for leg, outcome in self._run(finals):
            for trial in finals[leg]:
                yield self._verdict(trial, outcome)
            if isinstance(outcome, Outcome):
                shutil.rmtree(outcome.out)

    def reference(self, trial: Trial) -> Outcome | str:
        """Return the run of one process that a judged trial was compared with."""
        return self._references[_references(trial)[0]]

    def _run(self, legs: Iterable[Leg]) -> Iterator[tuple[Leg, Outcome | str]]:
        """Run legs whose predecessors have been run, and yield the outcome of each, or why there is none."""
        started: list[tuple[Leg, Outcome]] = []
        jobs: list[Job] = []
        for leg in legs:
            before = self._references[leg.after] if leg.after is not None else None
            base = self._references[leg.base] if leg.base is not None else None
            if isinstance(base, str):
                yield leg, f"before the adapters: {base}"
                continue
            if isinstance(before, str):
                yield leg, f"before the resume, at {leg.after.layout}: {before}"  # type: ignore[union-attr]
                continue
            self._numbers += 1
            out = self._folder / f"leg{self._numbers}"
            out.mkdir()
            if before is not None:
                shutil.copytree(before.run_dir, out / "run")
            labelled = any(setting.startswith("task.kind=") for setting in leg.settings)
            mixed = is_mixed(leg.settings)
            overrides = settings(
                self._stores, out / "run", leg.precision, self.seed, leg.stop, labelled, mixed
            )
            overrides += [*leg.layout.settings(), *leg.settings]
            overrides += [] if base is None else [as_word("init_from", base.run_dir)]
            jobs.append(Job(tuple(overrides), leg.layout.processes, out, leg.code))
            steps = before.steps if before is not None else 0
            started.append((leg, Outcome(out, out / "run", steps, leg.stop)))
        for number, error in self._workers.run(jobs):
            leg, outcome = started[number]
            yield leg, outcome if error is None else error

    def _verdict(self, trial: Trial, outcome: Outcome | str) -> Verdict:
        bound = HALF_BOUND if trial.is_half else FP64_BOUND
        yardsticks = [self._references[leg] for leg in _references(trial)]
        runs = [*(("reference", result) for result in yardsticks), ("", outcome)]
        for name, result in runs:
            if isinstance(result, str):
                return Verdict(trial, bound, error=f"{name}: {result}" if name else result)
        found = differences(yardsticks[0], outcome)  # type: ignore[arg-type]
        if trial.is_half:
            yardstick = without_metrics(differences(*yardsticks))  # type: ignore[arg-type]
            if (far := _too_far(yardstick, HALF_YARDSTICKS[trial.precision])) is not None:
                error = f"reference: {trial.precision} on one process is {far.value:.2g} from fp32 in {far}"
                return Verdict(trial, bound, error=error)
            found = _in_units_of(yardstick, without_metrics(found))
        kinds: tuple[str, ...] = KINDS
        if trial.through:
            kinds = (*KINDS, EXPORT)
            with tempfile.TemporaryDirectory(dir=self._folder) as out:
                try:
                    found += export_differences(yardsticks[0], outcome, trial.through, Path(out))  # type: ignore[arg-type]
                except (UserError, MachineError) as error:
                    return Verdict(trial, bound, error=f"to {trial.through}: {error}")
        return Verdict(trial, bound, tuple(_worst_of(kind, found) for kind in kinds))


def is_mixed(settings: Sequence[str]) -> bool:
    """Return whether a training takes proteins of very different lengths."""
    return any(setting in MIXED for setting in settings)


def _references(trial: Trial) -> list[Leg]:
    """Return the unbroken runs of one process that a trial must equal, or in bf16 and fp16 is measured by."""
    layout = trial.layouts[-1].reference
    # A larger micro-batch rounds its gradients fewer times, so it has a yardstick of its own. Which proteins
    # the steps of a resumed run take, inside a window, also depends on it.
    alike = replace(layout, packed=trial.layouts[-1].packed)
    if len(trial.layouts) > 1 or is_mixed(trial.settings):
        layout = alike
    if not trial.is_half:
        return [Leg(layout, trial.precision, trial.settings, base=_base(trial), code=trial.code)]
    single = Leg(layout, "fp32", trial.settings, base=_base(trial), code=trial.code)
    return [single, replace(single, layout=alike, precision=trial.precision)]


def _base(trial: Trial) -> Leg | None:
    """Return the plain training whose final weights the trial starts from; None if it starts anew."""
    return Leg(trial.layouts[-1].reference, "fp64", ()) if trial.continues else None


def _first_legs(trial: Trial) -> list[Leg]:
    base = _base(trial)
    what = (trial.precision, trial.settings, SAVED, None, base, trial.code)
    return [Leg(layout, *what) for layout in trial.layouts[:-1]]


def _final(trial: Trial) -> Leg:
    before = _first_legs(trial)
    after = before[-1] if before else None
    layout = trial.layouts[-1]
    return Leg(layout, trial.precision, trial.settings, STEPS, after, _base(trial), trial.code)


def _worst_of(kind: str, found: list[Difference]) -> Difference:
    of_kind = [difference for difference in found if difference.kind == kind]
    return worst(of_kind or [Difference(kind, "was not there to compare", "", math.inf)])


def _too_far(yardstick: list[Difference], limits: Mapping[str, float]) -> Difference | None:
    """Return a number that cannot be a unit: not finite, or too far from fp32 in the first two steps."""
    for difference in yardstick:
        limit = math.inf
        if difference.step is not None and difference.step <= 2:
            limit = limits.get(difference.kind, math.inf)
        if not difference.value < math.inf or difference.value > limit:
            return difference
    return None


def _in_units_of(yardstick: list[Difference], found: list[Difference]) -> list[Difference]:
    """Divide `found` by the largest yardstick of the same quantity.

    For a gradient that is the yardstick of the same step; for a single number the largest of all steps, and
    for a loss that of training and validation, since one of them may be near by chance.
    """

    def key(difference: Difference) -> tuple[str, str, int | None]:
        step = difference.step if difference.kind == "gradient" else None
        name = "" if difference.kind == "loss" else difference.name
        return difference.kind, name, step

    units: dict[tuple[str, str, int | None], float] = {}
    for difference in yardstick:
        units[key(difference)] = max(units.get(key(difference), _FP32_ROUNDING), difference.value)
    return [
        replace(difference, value=difference.value / units.get(key(difference), _FP32_ROUNDING))
        for difference in found
    ]
