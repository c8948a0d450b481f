"""Draws the report of a run from its log: `report.png` and a self-contained `report.html`."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm2mega.config.renamed import REMOVED, current_key
from esm2mega.errors import UserError
from esm2mega.files import replacing
from esm2mega.report.log import DOWNSTREAM, EVAL, LOG_NAME, TRAIN, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

CONFIG_NAME = "config.yaml"
PNG_NAME, HTML_NAME = "report.png", "report.html"

# Colours that stay apart for the common forms of colour blindness (Okabe and Ito), and in grey.
TRAIN_COLOR, VALID_COLOR, BASELINE_COLOR, AXIS_COLOR = "#0072B2", "#D55E00", "#555555", "#888888"
TASK_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MOST = 1e300
"""No value of a run is larger; sums and margins of larger ones would be infinite."""

SMOOTHING_POINTS = 60
"""Counts the training records above which a running mean is drawn over the raw curve."""


@dataclass(frozen=True)
class PlotFiles:
    """Holds the paths of a report, and the final numbers that it shows."""

    png: Path
    html: Path
    summary: dict[str, str]


def plot_run(run_dir: str | Path) -> PlotFiles:
    """Draw the report of a run into `run_dir`, from its `log.jsonl` and, if there is one, `config.yaml`.

    Raises:
        UserError: There is no log, or it has no training or evaluation record.
    """
    run_dir = Path(run_dir)
    log = run_dir / LOG_NAME
    records = read_log(log)
    train = [record for record in records if record.get("kind") == TRAIN]
    evaluations = [record for record in records if record.get("kind") == EVAL]
    if not train and not evaluations:
        raise UserError(
            f"{log} holds no training or evaluation record yet; plot again after train.log_every steps"
        )
    downstream = downstream_curves([record for record in records if record.get("kind") == DOWNSTREAM])
    summary = summarise(train, evaluations) | summarise_downstream(downstream)
    png = _png(_figure(run_dir.resolve().name, train, evaluations, downstream))
    page = _html(run_dir.resolve().name, png, summary, read_config(run_dir))
    files = PlotFiles(run_dir / PNG_NAME, run_dir / HTML_NAME, summary)
    # A browser that reloads during a run never sees half a page.
    for path, data in ((files.png, png), (files.html, page.encode())):
        with replacing(path, "free space or fix its permissions") as partial:
            partial.write_bytes(data)
    return files


def summarise(train: Sequence[Record], evaluations: Sequence[Record]) -> dict[str, str]:
    """Return the final numbers of a run as label -> text, best evaluation included."""
    rows: dict[str, str] = {}
    measured = [record for record in evaluations if _number(record, "valid_loss") is not None]
    if nothing := len(evaluations) - len(measured):
        rows["Evaluations without a loss"] = f"{nothing:,} (nothing to predict, or the run diverged there)"
    if measured:
        # Losses of another recipe are those of other masks: the best is the best of the last recipe.
        measured = _of_last_recipe(measured)
        last, best = measured[-1], min(measured, key=lambda record: record["valid_loss"])
        rows["Validation loss"] = f"{last['valid_loss']:.4f} nats at step {last['step']:,}"
        if (perplexity := _number(last, "valid_perplexity")) is not None:
            rows["Validation perplexity"] = f"{perplexity:.3f}"
        rows["Best validation loss"] = f"{best['valid_loss']:.4f} nats at step {best['step']:,}"
        if last.get("eval_recipe"):
            rows["Evaluation recipe"] = last["eval_recipe"]
        unigram = _number(last, "unigram_loss")
        if unigram is not None:
            rows["Unigram baseline"] = f"{unigram:.4f} nats"
            gain = unigram - last["valid_loss"]
            rows["Against the baseline"] = f"{abs(gain):.4f} nats {'below' if gain >= 0 else 'above'}"
    if train:
        last = train[-1]
        rows["Steps"] = f"{last['step']:,}"
        for key, label, text in (
            ("loss", "Training loss", "{:.4f} nats"),
            ("consumed_tokens", "Tokens consumed", "{:,.0f}"),
            ("pack_fill", "Pack fill", "{:.1%}"),
            ("memory_gb", "Memory", "{:.2f} GB"),
        ):
            value = _number(last, key)
            if value is not None:
                rows[label] = text.format(value)
        rates = sorted(r for record in train if (r := _number(record, "tokens_per_second")) is not None)
        if rates:
            rows["Median throughput"] = f"{rates[len(rates) // 2]:,.0f} tokens/s"
        undefined = sum("loss" in record and record["loss"] is None for record in train)
        if undefined:
            rows["Records without a loss"] = f"{undefined:,} (nothing to predict, or the run diverged there)"
    return rows


Curves = dict[str, tuple[list[int], list[float]]]
"""Maps ``TASK/SPLIT_METRIC`` to the steps at which a downstream task was measured, and the values there."""


def downstream_curves(records: Sequence[Record]) -> Curves:
    """Return what was measured of each downstream task, in the order of the steps."""
    ordered = sorted(records, key=lambda record: record["step"])
    names = dict.fromkeys(name for record in ordered for name in record if "/" in name)
    curves = {name: _curve(ordered, name) for name in names}
    return {name: curve for name, curve in curves.items() if curve[0]}


def summarise_downstream(curves: Curves) -> dict[str, str]:
    """Return the last value of each downstream task as label -> text."""
    return {
        f"Downstream {name}": f"{values[-1]:.4f} at step {steps[-1]:,}"
        for name, (steps, values) in curves.items()
    }


def _of_last_recipe(evaluations: Sequence[Record]) -> list[Record]:
    """Return the evaluations that were made as the last one was; those of earlier versions name no recipe."""
    recipe = evaluations[-1].get("eval_recipe")
    return [record for record in evaluations if record.get("eval_recipe") == recipe]


def read_config(run_dir: Path) -> dict[str, str]:
    """Return the resolved configuration as dotted key -> text; empty when the run has none."""
    path = run_dir / CONFIG_NAME
    if not path.exists():
        return {}
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as YAML: {str(error).splitlines()[0]}") from None
    settings = _flatten(loaded) if isinstance(loaded, dict) else []
    return {current_key(key): value for key, value in settings if key not in REMOVED}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "" if value is None else str(value)))
    return rows


def _figure(
    name: str, train: Sequence[Record], evaluations: Sequence[Record], downstream: Curves | None = None
) -> Figure:
    """Draw the loss over the full width, other curves of the training below it, and downstream tasks last."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot needs the package matplotlib; pip install matplotlib") from None
    # A Figure of its own, not pyplot: no global state and no display.
    rows = [2.1, 1, 1.4] if downstream else [2.1, 1]
    height = 7.2 * sum(rows) / sum(rows[:2])
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(rows), 3, height_ratios=rows)
    figure.suptitle(name, fontsize=14, fontweight="bold", x=0.012, ha="left")
    _draw_loss(figure.add_subplot(grid[0, :]), train, evaluations)
    panels = (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm before clipping"),
        ("tokens_per_second", "Throughput (residues / s)"),
    )
    for column, (key, title) in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1, column]), train, key, title)
    if downstream:
        _draw_downstream(figure.add_subplot(grid[2, :]), downstream)
    return figure


def _draw_downstream(axes: Axes, curves: Curves) -> None:
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
    _style(axes)
    axes.set_xlabel("optimizer step")
    axes.legend(frameon=False, loc="best", fontsize=9)


def _draw_loss(axes: Axes, train: Sequence[Record], evaluations: Sequence[Record]) -> None:
    steps, losses = _curve(train, "loss")
    if steps:
        smooth = len(losses) > SMOOTHING_POINTS
        axes.plot(
            steps, losses, color=TRAIN_COLOR, linewidth=0.8 if smooth else 1.6, alpha=0.3 if smooth else 1.0,
            label=None if smooth else "training", marker="o" if len(steps) == 1 else None,
        )  # fmt: skip
        if smooth:
            window = max(5, len(losses) // 40)
            axes.plot(
                steps, running_mean(losses, window), color=TRAIN_COLOR, linewidth=1.8,
                label=f"training (mean of {window} records)",
            )  # fmt: skip
    eval_steps, eval_losses = _draw_validation(axes, evaluations)
    _, baselines = _curve(evaluations, "unigram_loss")
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
    axes.set_ylabel("masked cross-entropy (nats per residue)")
    _style(axes)
    axes.set_xlabel("optimizer step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best", fontsize=10)


def _draw_validation(axes: Axes, evaluations: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Draw a line for each recipe, since their losses cannot be compared; return the points of the last."""
    by_recipe = itertools.groupby(evaluations, key=lambda record: record.get("eval_recipe"))
    curves = [(recipe, *_curve(list(group), "valid_loss")) for recipe, group in by_recipe]
    curves = [curve for curve in curves if curve[1]]
    for number, (recipe, steps, losses) in enumerate(curves, start=1):
        is_last = number == len(curves)
        axes.plot(
            steps, losses, color=VALID_COLOR, linewidth=2.0, marker="o", alpha=1.0 if is_last else 0.4,
            markersize=4.5 if len(steps) <= 40 else 0,
            label="validation" if is_last else f"validation, recipe {recipe or 'of an earlier version'}",
        )  # fmt: skip
    return curves[-1][1:] if curves else ([], [])


def _draw_panel(axes: Axes, train: Sequence[Record], key: str, title: str) -> None:
    steps, values = _curve(train, key)
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
    _style(axes)
    if key == "lr" and steps:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("optimizer step", fontsize=9)


def _style(axes: Axes) -> None:
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


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window - 1` before it, none of those after it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def _curve(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    points = [
        (int(record["step"]), value) for record in records if (value := _number(record, key)) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def _number(record: Record, key: str) -> float | None:
    """Return a value of a record if it is a number that can be drawn."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > _MOST:
        return None
    return float(value)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - esm2mega</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem; }}
img {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; font-weight: normal; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid #e6e6e6; vertical-align: top; overflow-wrap: anywhere; }}
th {{ color: #555; width: 20rem; }}
.config th, .config td {{ font-family: ui-monospace, monospace; font-size: 13px; }}
summary {{ cursor: pointer; font-size: 1.05rem; margin: 2rem 0 .5rem; font-weight: bold; }}
footer {{ color: #777; font-size: 13px; margin: 2rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
<h2>Final numbers</h2>
<table>{summary}</table>
<h2>Curves</h2>
<img alt="Loss, learning rate, gradient norm, throughput and downstream tasks by optimizer step"
  src="data:image/png;base64,{png}">
{config}
<footer>esm2mega. The unigram baseline is the cross-entropy of a model that knows only the residue
frequencies of the training set; a model that has learned anything about proteins is below it.</footer>
</body>
</html>
"""


def _html(title: str, png: bytes, summary: Mapping[str, str], config: Mapping[str, str]) -> str:
    section = ""
    if config:
        table = f'<table class="config">{_rows(config)}</table>'
        section = f"<details open><summary>Configuration</summary>{table}</details>"
    return PAGE.format(
        title=html.escape(title), summary=_rows(summary), png=base64.b64encode(png).decode(), config=section
    )


def _rows(table: Mapping[str, str]) -> str:
    return "\n".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>'
        for key, value in table.items()
    )
