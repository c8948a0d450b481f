"""Takes curves and numbers out of the records of a log, for the report of a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esm2mega.config.best_metric import HEADLINES, headline_of, less_is_better

Record = Mapping[str, Any]

Curve = tuple[list[int], list[float]]
"""Holds the steps at which something was measured, and the values there."""

MASKED = "masked cross-entropy (nats per residue)"
"""Names the loss of a pretraining."""

_LOSSES = {
    "classification": "cross-entropy (nats per label)",
    "multilabel": "binary cross-entropy (nats per label)",
    "token_classification": "cross-entropy (nats per labelled residue)",
    "contact": "binary cross-entropy (nats per pair of residues)",
}

SMOOTHING_POINTS = 60
"""Counts the training records above which a running mean is drawn over the raw curve."""

_COMPARED = ("rmse", "mae")
"""Lists errors that a constant prediction has as well."""

_MOST = 1e300
"""No value of a run is larger; sums and margins of larger ones would be infinite."""

_VALID, _TEST, _BASELINE = "valid_", "test_", "baseline_"


def number(record: Record, key: str) -> float | None:
    """Return a value of a record if it is a number that can be drawn."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > _MOST:
        return None
    return float(value)


def curve(records: Sequence[Record], key: str) -> Curve:
    """Return the steps and values of the records that have a number under `key`."""
    points = [
        (int(record["step"]), value) for record in records if (value := number(record, key)) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def loss_label(config: Mapping[str, str], is_task: bool) -> str:
    """Return name and unit of the loss that a configuration trains with.

    Args:
        config: Dotted key -> text, from `esm2mega.report.run_records.read_config`; empty if it is lost.
        is_task: Whether the records are those of a fine-tuning.
    """
    kind = config.get("task.kind")
    if not kind:
        return "loss" if is_task else MASKED
    if not kind.endswith("regression"):
        return _LOSSES.get(kind, "loss")
    name = "Huber loss" if config.get("task.loss") == "huber" else "mean squared error"
    is_scaled = config.get("task.scale_targets", "True").lower() == "true"
    power = "" if config.get("task.loss") == "huber" else ", squared"
    unit = "standard deviations of the training labels" if is_scaled else "units of the labels"
    return f"{name} ({unit}{power})"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window - 1` before it, none of those after it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def smoothed(values: Sequence[float]) -> tuple[list[float], int]:
    """Return the running mean that is drawn of a long curve, and over how many records: 1 for a short one."""
    window = max(5, len(values) // 40) if len(values) > SMOOTHING_POINTS else 1
    return running_mean(values, window), window


def recipes_of(evaluations: Sequence[Record]) -> list[tuple[str | None, list[Record]]]:
    """Return the evaluations by recipe, in their order: losses of different recipes cannot be compared."""
    groups = itertools.groupby(evaluations, key=lambda record: record.get("eval_recipe"))
    return [(recipe, list(group)) for recipe, group in groups]


def of_last_recipe(evaluations: Sequence[Record]) -> list[Record]:
    """Return the evaluations that were made as the last one was; those of earlier versions name no recipe."""
    recipe = evaluations[-1].get("eval_recipe") if evaluations else None
    return [record for record in evaluations if record.get("eval_recipe") == recipe]


def downstream_curves(records: Sequence[Record]) -> dict[str, Curve]:
    """Return what was measured of downstream tasks as ``TASK/SPLIT_METRIC``, in the order of the steps."""
    ordered = sorted(records, key=lambda record: record["step"])
    names = dict.fromkeys(name for record in ordered for name in record if "/" in name)
    curves = {name: curve(ordered, name) for name in names}
    return {name: found for name, found in curves.items() if found[0]}


@dataclass(frozen=True)
class TaskRun:
    """Holds what the evaluations of a fine-tuning measured.

    Attributes:
        headline: The metric that judges the task.
        valid: Metric -> its values on the validation split, by the last recipe alone.
        test: Metric -> its value on the test split; empty before the test.
        test_step: The step whose weights were tested; None before the test.
        baseline: Metric -> what a predictor that knows only the training labels has on the test split, or on
            the validation split of a run without one; it has none where the metric is not defined for a
            constant, as correlations are not.
        baseline_split: The split of the baseline, in words.
    """

    headline: str
    valid: dict[str, Curve]
    test: dict[str, float]
    test_step: int | None
    baseline: dict[str, float]
    baseline_split: str = "test"

    def best(self, metric: str) -> tuple[int, float] | None:
        """Return step and value of the best validation, the first of equal ones; None where there is none."""
        points = list(zip(*self.valid.get(metric, ([], [])), strict=True))
        sign = 1 if less_is_better(metric) else -1
        return min(points, key=lambda point: sign * point[1]) if points else None

    @property
    def drawn(self) -> list[str]:
        """Return the metrics that have a chart: the headline, and an error where that has no baseline.

        A constant has no rank correlation, so that of a regression has nothing to be compared with.
        """
        has_baseline = self.headline in self.baseline
        others = [name for name in _COMPARED if name in self.baseline and not has_baseline]
        return [self.headline, *others[:1]]

    @property
    def metrics(self) -> list[str]:
        """Return the names of all metrics, the headline first."""
        return list(dict.fromkeys([self.headline, *self.valid, *self.test, *self.baseline]))


def task_run(evaluations: Sequence[Record], tests: Sequence[Record], kind: str | None) -> TaskRun | None:
    """Return what a fine-tuning measured; None for a pretraining.

    Args:
        evaluations: Records of the validation split.
        tests: Records of the test split; the last one holds.
        kind: The value of `task.kind` in the configuration, if that is there.
    """
    evaluations = of_last_recipe(evaluations)
    valid = {
        name.removeprefix(_VALID): found
        for name in dict.fromkeys(name for record in evaluations for name in record)
        if name.startswith(_VALID)
        and not name.startswith(f"{_VALID}{_BASELINE}")
        and (found := curve(evaluations, name))[0]
    }
    last = tests[-1] if tests else {}
    test, baseline = _values(last, _TEST), _values(last, f"{_TEST}{_BASELINE}")
    # Without a test split, the records of validation have the baseline.
    if not tests and evaluations:
        baseline = _values(evaluations[-1], f"{_VALID}{_BASELINE}")
    # A metric that was never defined has no curve, but says as well what the task is.
    named = {name.removeprefix(_VALID) for record in evaluations for name in record}
    headline = (
        headline_of(named) or headline_of([n.removeprefix(_TEST) for n in last]) or HEADLINES.get(kind or "")
    )
    if headline is None:
        return None
    return TaskRun(
        headline,
        valid,
        {name: value for name, value in test.items() if not name.startswith(_BASELINE)},
        int(last["step"]) if "step" in last else None,
        baseline,
        "validation" if baseline and not tests else "test",
    )


def _values(record: Record, prefix: str) -> dict[str, float]:
    """Return the numbers of a record whose names begin with `prefix`, by their names without it."""
    named = {name.removeprefix(prefix): number(record, name) for name in record if name.startswith(prefix)}
    return {name: value for name, value in named.items() if value is not None}
