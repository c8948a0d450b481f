"""Draws the curves of a run as one figure."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from esm2mega.errors import UserError
from esm2mega.report.curves import Curve, Record, TaskRun, curve, loss_label, recipes_of, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for the common forms of colour blindness (Okabe and Ito), and in grey.
TRAIN_COLOR, VALID_COLOR, BASELINE_COLOR, AXIS_COLOR = "#0072B2", "#D55E00", "#555555", "#888888"
TASK_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

_LETTERS_BESIDE = 32
"""Limits a line of the name of the loss, which stands upright, no longer than its panel is high."""


def figure_of(
    name: str,
    train: Sequence[Record],
    evaluations: Sequence[Record],
    downstream: Mapping[str, Curve] | None = None,
    task: TaskRun | None = None,
    label: str | None = None,
) -> Figure:
    """Draw the loss over the full width, other curves of the training below it, and downstream tasks last.

    Args:
        name: Title.
        train: Records of training steps.
        evaluations: Records of the validation split.
        downstream: What was measured of downstream tasks.
        task: What a fine-tuning measured, drawn above its loss; None for a pretraining.
        label: Name and unit of the loss; None if all that is known is whether it is that of a task.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot needs the package matplotlib; pip install matplotlib") from None
    # A Figure of its own, not pyplot: no global state and no display.
    rows = [1.6] * (task is not None) + [2.1 if task is None else 1.4, 1] + [1.4] * bool(downstream)
    figure = Figure(figsize=(11, 7.2 * sum(rows) / 3.1), dpi=150, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(rows), 3, height_ratios=rows)
    figure.suptitle(name, fontsize=14, fontweight="bold", x=0.012, ha="left")
    row = 0
    if task is not None:
        places = grid[0, :].subgridspec(1, len(task.drawn))
        for column, metric in enumerate(task.drawn):
            _draw_metric(figure.add_subplot(places[0, column]), task, metric)
        row = 1
    label = label or loss_label({}, task is not None)
    _draw_loss(figure.add_subplot(grid[row, :]), train, evaluations, label)
    panels = (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm before clipping"),
        ("tokens_per_second", "Throughput (residues / s)"),
    )
    for column, (key, title) in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[row + 1, column]), train, key, title)
    if downstream:
        _draw_downstream(figure.add_subplot(grid[row + 2, :]), downstream)
    return figure


def _draw_metric(axes: Axes, task: TaskRun, name: str) -> None:
    """Draw a metric of a task: validation over steps, and test and baseline as levels."""
    steps, values = task.valid.get(name, ([], []))
    if steps:
        axes.plot(
            steps, values, color=VALID_COLOR, linewidth=2.0, marker="o",
            markersize=4.5 if len(steps) <= 40 else 0, label="validation",
        )  # fmt: skip
    if (best := task.best(name)) is not None:
        axes.plot(
            *([best[0]], [best[1]]), color=VALID_COLOR, linestyle="", marker="*", markersize=14,
            label=f"best validation ({best[1]:.3f} at step {best[0]:,})",
        )  # fmt: skip
    if (value := task.test.get(name)) is not None:
        axes.axhline(value, color=TRAIN_COLOR, linewidth=1.6, label=f"test ({value:.3f})")
    if (value := task.baseline.get(name)) is not None:
        axes.axhline(
            value, color=BASELINE_COLOR, linewidth=1.4, linestyle=(0, (6, 3)),
            label=f"baseline, {task.baseline_split} split ({value:.3f})",
        )  # fmt: skip
    axes.set_ylabel(name.replace("_", " "))
    style_axes(axes)
    axes.set_xlabel("optimizer step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best", fontsize=10)
    else:
        axes.text(
            *(0.5, 0.5, f"{name} is not defined, or not evaluated yet"), transform=axes.transAxes,
            ha="center", va="center", color=AXIS_COLOR,
        )  # fmt: skip


def _draw_downstream(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Draw a curve for each task and split: one colour for a task, and dashes for the validation proteins."""
    tasks = list(dict.fromkeys(name.rpartition("/")[0] for name in curves))
    for name, (steps, values) in curves.items():
        task, _, metric = name.rpartition("/")
        axes.plot(
            steps, values, color=TASK_COLORS[tasks.index(task) % len(TASK_COLORS)], linewidth=1.6, marker="o",
            markersize=3.5, linestyle="--" if metric.startswith("valid_") else "-",
            label=f"{task}: {metric.replace('_', ' ', 1)}",
        )  # fmt: skip
    axes.set_title("Downstream tasks, by a small head on frozen embeddings", fontsize=10, loc="left")
    style_axes(axes)
    axes.set_xlabel("optimizer step")
    axes.legend(frameon=False, loc="best", fontsize=9)


def _draw_loss(axes: Axes, train: Sequence[Record], evaluations: Sequence[Record], label: str) -> None:
    steps, losses = curve(train, "loss")
    if steps:
        means, window = smoothed(losses)
        smooth = window > 1
        axes.plot(
            steps, losses, color=TRAIN_COLOR, linewidth=0.8 if smooth else 1.6, alpha=0.3 if smooth else 1.0,
            label=None if smooth else "training", marker="o" if len(steps) == 1 else None,
        )  # fmt: skip
        if smooth:
            axes.plot(
                steps, means, color=TRAIN_COLOR, linewidth=1.8,
                label=f"training (mean of {window} records)",
            )  # fmt: skip
    eval_steps, eval_losses = _draw_validation(axes, evaluations)
    _, baselines = curve(evaluations, "unigram_loss")
    if baselines:
        axes.axhline(
            baselines[-1], color=BASELINE_COLOR, linewidth=1.4, linestyle=(0, (6, 3)),
            label=f"unigram baseline ({baselines[-1]:.3f})",
        )  # fmt: skip
    if eval_steps:
        axes.annotate(
            f"{eval_losses[-1]:.3f}", (eval_steps[-1], eval_losses[-1]), xytext=(0, 12),
            textcoords="offset points", ha="center", fontsize=11, color=VALID_COLOR, fontweight="bold",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip
    axes.set_ylabel(textwrap.fill(label, _LETTERS_BESIDE))
    style_axes(axes)
    axes.set_xlabel("optimizer step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best", fontsize=10)


def _draw_validation(axes: Axes, evaluations: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Draw a line for each recipe, since their losses cannot be compared; return the points of the last."""
    curves = [(recipe, *curve(group, "valid_loss")) for recipe, group in recipes_of(evaluations)]
    curves = [found for found in curves if found[1]]
    for number, (recipe, steps, losses) in enumerate(curves, start=1):
        is_last = number == len(curves)
        axes.plot(
            steps, losses, color=VALID_COLOR, linewidth=2.0, marker="o", alpha=1.0 if is_last else 0.4,
            markersize=4.5 if len(steps) <= 40 else 0,
            label="validation" if is_last else f"validation, recipe {recipe or 'of an earlier version'}",
        )  # fmt: skip
    return curves[-1][1:] if curves else ([], [])


def _draw_panel(axes: Axes, train: Sequence[Record], key: str, title: str) -> None:
    steps, values = curve(train, key)
    axes.set_title(title, fontsize=10, loc="left")
    if steps:
        axes.plot(steps, values, color=TRAIN_COLOR, linewidth=1.2, marker="o" if len(steps) == 1 else None)
        # Gradient norms span decades at the start of training; a linear axis would flatten all that follows.
        if key == "grad_norm" and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    else:
        axes.text(
            0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", va="center", color=AXIS_COLOR
        )
    style_axes(axes)
    if key == "lr" and steps:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("optimizer step", fontsize=9)


def style_axes(axes: Axes) -> None:
    """Give axes the looks of all pages: a light grid, whole steps, and large numbers in short."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS_COLOR)
    axes.tick_params(colors="#333333", labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if axes.get_xlim()[1] >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_yscale() == "linear" and axes.get_ylim()[1] >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def png_of(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
