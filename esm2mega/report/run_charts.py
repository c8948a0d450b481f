"""Draws the curves of one run, or of several over each other, as charts for its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from esm2mega.report.curves import Curve, TaskRun, curve, loss_label, recipes_of, smoothed
from esm2mega.report.results.charts import COLORS, GREY, Axis, Plot, axis_of
from esm2mega.report.run_records import RunRecords

STEP = "optimizer step"

_PANELS = (
    ("lr", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm before clipping", "norm"),
    ("tokens_per_second", "Throughput", "residues per second"),
)
"""Lists what is drawn of the training records besides the loss: key, title, and name of the axis."""

_TRAIN, _VALID, _TEST = COLORS[:3]


def charts_of_run(run: RunRecords) -> str:
    """Return the charts of one run as HTML: the metric of a task, losses, and how the training went."""
    label = loss_label(run.config, run.task is not None)
    charts = [] if run.task is None else [_metric(run.task, name) for name in run.task.drawn]
    charts.append(_losses(run, label))
    charts += [_panel({"": run}, key, title, name) for key, title, name in _PANELS]
    if run.downstream:
        charts.append(_downstream(run.downstream))
    return _side_by_side(charts)


def charts_of_runs(runs: Mapping[str, RunRecords]) -> str:
    """Return charts of several runs, each with a colour for every run."""
    labels = {loss_label(run.config, run.task is not None) for run in runs.values()}
    label = labels.pop() if len(labels) == 1 else "loss"
    headlines = {None if run.task is None else run.task.headline for run in runs.values()}
    headline = headlines.pop() if len(headlines) == 1 else None
    panels = [("loss", "Training", label), ("valid_loss", "Validation", label)]
    if headline is not None:
        panels.append((f"valid_{headline}", f"Validation: {_words(headline)}", _words(headline)))
    return _side_by_side([_panel(runs, *panel) for panel in (*panels, *_PANELS)])


def _side_by_side(charts: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(charts)}</div>'


def _metric(task: TaskRun, metric: str) -> str:
    """Draw a metric of a task: validation over steps, and test and baseline as levels."""
    name = _words(metric)
    steps, values = task.valid.get(metric, ([], []))
    levels = {
        "test": (_TEST, task.test.get(metric)),
        f"baseline, {task.baseline_split} split": (GREY, task.baseline.get(metric)),
    }
    known = [value for _, value in levels.values() if value is not None]
    plot = Plot(_step_axis(steps), axis_of(name, [*values, *known]))
    _draw(plot, (steps, values), _VALID, "validation")
    for text, (color, value) in levels.items():
        if value is not None:
            plot.line([plot.x.low, plot.x.high], [value] * 2, color, dashed=color == GREY)
            plot.label(color, f"{text}: {value:.4g}")
    best = task.best(metric)
    note = "" if best is None else f"best validation {best[1]:.4g} at step {best[0]:,}"
    return plot.figure(name, note or "not defined, or not evaluated yet")


def _losses(run: RunRecords, label: str) -> str:
    """Draw training and validation, with a line for each recipe of validation, for these do not compare."""
    train = curve(run.train, "loss")
    mean, window = smoothed(train[1])
    valid = [
        (recipe, found)
        for recipe, group in recipes_of(run.evaluations)
        if (found := curve(group, "valid_loss"))[0]
    ]
    _, baselines = curve(run.evaluations, "unigram_loss")
    everything = [curve for _, curve in valid] + [train]
    plot = Plot(
        _step_axis([step for steps, _ in everything for step in steps]),
        axis_of(label, [*(value for _, values in everything for value in values), *baselines[-1:]]),
    )
    if window > 1:
        plot.line(*train, f"{_TRAIN} faint")
    _draw(
        plot, (train[0], mean), _TRAIN, "training" if window == 1 else f"training, mean of {window} records"
    )
    for number, (recipe, found) in enumerate(valid, start=1):
        name = (
            "validation"
            if number == len(valid)
            else f"validation, recipe {recipe or 'of an earlier version'}"
        )
        _draw(plot, found, _VALID if number == len(valid) else COLORS[2 + number % 4], name)
    if baselines:
        plot.line([plot.x.low, plot.x.high], baselines[-1:] * 2, GREY, dashed=True)
        plot.label(GREY, f"unigram baseline: {baselines[-1]:.4g}")
    return plot.figure("Loss")


def _panel(runs: Mapping[str, RunRecords], key: str, title: str, name: str) -> str:
    """Draw what each of several runs has under a key; of one run without a name for it."""
    curves = {
        run: curve(records.evaluations if key.startswith("valid_") else records.train, key)
        for run, records in runs.items()
    }
    if key == "loss":
        curves = {run: (steps, smoothed(values)[0]) for run, (steps, values) in curves.items()}
    values = [value for _, found in curves.values() for value in found]
    steps = [step for found, _ in curves.values() for step in found]
    # Gradient norms span decades at the start of training; a linear axis would flatten all that follows.
    if key == "grad_norm" and values and min(values) > 0 and max(values) > 20 * min(values):
        axis = Axis(name, min(values) / 1.1, max(values) * 1.1, is_log=True)
    else:
        axis = axis_of(name, values if "loss" in key or key.startswith("valid_") else [*values, 0.0])
    plot = Plot(_step_axis(steps), axis)
    for number, (run, found) in enumerate(curves.items()):
        again = number // len(COLORS) % 2 == 1  # more runs than colours
        _draw(plot, found, COLORS[number % len(COLORS)], run or name, dashed=again, is_named=bool(run))
    return plot.figure(title, "" if values else "not in the log")


def _downstream(curves: Mapping[str, Curve]) -> str:
    """Draw a line for each task and split: one colour for a task, and dashes for the validation proteins."""
    tasks = list(dict.fromkeys(name.rpartition("/")[0] for name in curves))
    plot = Plot(
        _step_axis([step for steps, _ in curves.values() for step in steps]),
        axis_of("metric", [value for _, values in curves.values() for value in values]),
    )
    for name, found in curves.items():
        task, _, metric = name.rpartition("/")
        color = COLORS[tasks.index(task) % len(COLORS)]
        is_valid = metric.startswith("valid_")
        _draw(plot, found, color, f"{task}: {metric.replace('_', ' ', 1)}", dashed=is_valid)
    return plot.figure("Downstream tasks", "by a small head on frozen embeddings")


def _draw(
    plot: Plot, found: Curve, color: str, name: str, dashed: bool = False, is_named: bool = True
) -> None:
    steps, values = found
    if not steps:
        return
    if len(steps) == 1:
        plot.dots(steps, values, color)
    else:
        plot.line(steps, values, color, dashed)
    plot.values(steps, values, color, name)
    if is_named:
        plot.label(color, name)


def _step_axis(steps: Sequence[int]) -> Axis:
    return Axis(STEP, 0, max([*steps, 1]))


def _words(name: str) -> str:
    return name.replace("_", " ")
