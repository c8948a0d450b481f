"""Draws several runs over each other, and lists the keys in which they differ and their final numbers."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esm2mega.errors import UserError
from esm2mega.files import real_path
from esm2mega.report.curves import curve, loss_label, smoothed
from esm2mega.report.figure import png_of, style_axes
from esm2mega.report.plot import write_report
from esm2mega.report.results.charts import scrolling
from esm2mega.report.run_charts import charts_of_runs
from esm2mega.report.run_records import RunRecords, read_run
from esm2mega.report.style import page_of
from esm2mega.report.summary import summarise, summarise_downstream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that stay apart for the common forms of colour blindness (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")

_LETTERS_ABOVE = 60
"""Limits a line of a panel's title, which stands above half of the figure."""

_STYLE = "h1 { overflow-wrap: anywhere; }\n"

_BODY = """<h1>{title}</h1>
<h2>Final numbers</h2>
{numbers}
<h2>Keys that differ</h2>
{keys}
{sections}
<h2>Curves</h2>
<p>Put the pointer on a curve to read its values.</p>
{charts}"""


def plot_runs(run_dirs: Sequence[str | Path], out: str | Path, sections: str = "") -> list[str]:
    """Draw runs over each other into the directory `out`; return the paths of the PNG and the HTML file.

    Args:
        run_dirs: Directories of two runs or more, each named once.
        out: Directory for the files; it is made if it is absent.
        sections: More sections of the page, as HTML, before its curves.

    Raises:
        UserError: A run is named twice, or has nothing to draw.
    """
    real = [str(real_path(run)) for run in run_dirs]
    for number, run in enumerate(run_dirs):
        if real[number] in real[:number]:
            raise UserError(f"{run} is named twice; name each run once")
    names = unique_names(real)
    runs = {name: read_run(run) for name, run in zip(names, run_dirs, strict=True)}
    png = png_of(_figure(runs))
    title = html.escape(" and ".join(names) if len(names) == 2 else f"{len(names)} runs")
    body = _BODY.format(
        title=title,
        numbers=_table("number", names, final_numbers(runs)),
        keys=_table("key", names, differing_keys(runs)),
        sections=sections,
        charts=charts_of_runs(runs),
    )
    page = page_of(title, body, f"esm2mega. {_comparable(runs)}", _STYLE)
    return [str(path) for path in write_report(Path(out), png, page)]


def unique_names(paths: Sequence[str]) -> list[str]:
    """Return the last folder of each path, and as many above it as tell all of them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def differing_keys(runs: Mapping[str, RunRecords]) -> dict[str, list[str]]:
    """Return the value that each run has of every key in which two of them differ; a run may lack one."""
    keys = dict.fromkeys(key for run in runs.values() for key in run.config)
    values = {key: [run.config.get(key, "not there") for run in runs.values()] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def final_numbers(runs: Mapping[str, RunRecords]) -> dict[str, list[str]]:
    """Return every final number that some run has, with an empty text where another has none."""
    each = [
        summarise(run.train, run.evaluations, run.task) | summarise_downstream(run.downstream)
        for run in runs.values()
    ]
    return {
        name: [one.get(name, "") for one in each] for name in dict.fromkeys(n for one in each for n in one)
    }


def _comparable(runs: Mapping[str, RunRecords]) -> str:
    """Say whether the validation losses were measured alike."""
    recipes = {run.evaluations[-1].get("eval_recipe") for run in runs.values() if run.evaluations}
    if len(recipes) > 1:
        return "The evaluation recipes differ, so the validation losses cannot be compared with each other."
    return "Whether two runs differ by more than chance is what <code>esm2mega compare</code> measures."


def _figure(runs: Mapping[str, RunRecords]) -> Figure:
    """Draw training, validation, learning rate, gradient norm and throughput, with a colour for each run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot needs the package matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(11, 9), dpi=150, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(3, 6, height_ratios=[1.4, 1.4, 1])
    labels = {loss_label(run.config, run.task is not None) for run in runs.values()}
    label = labels.pop() if len(labels) == 1 else "loss"
    headlines = {None if run.task is None else run.task.headline for run in runs.values()}
    headline = headlines.pop() if len(headlines) == 1 else None
    panels = [
        (grid[0, :], "loss", f"training: {label}"),
        (grid[1, :] if headline is None else grid[1, :3], "valid_loss", f"validation: {label}"),
        (grid[2, :2], "lr", "learning rate"),
        (grid[2, 2:4], "grad_norm", "gradient norm before clipping"),
        (grid[2, 4:], "tokens_per_second", "throughput (residues / s)"),
    ]
    if headline is not None:
        panels.append((grid[1, 3:], f"valid_{headline}", f"validation: {headline.replace('_', ' ')}"))
    for place, key, title in panels:
        axes = figure.add_subplot(place)
        for number, (name, run) in enumerate(runs.items()):
            steps, values = curve(run.evaluations if key.startswith("valid_") else run.train, key)
            if key == "loss":
                values, _ = smoothed(values)
            axes.plot(
                steps, values, color=COLORS[number % len(COLORS)], label=name, linewidth=1.5,
                linestyle=DASHES[number // len(COLORS) % len(DASHES)], marker="o" if len(steps) < 3 else None,
            )  # fmt: skip
        axes.set_title(textwrap.fill(title, _LETTERS_ABOVE), fontsize=10, loc="left")
        style_axes(axes)
        if key == "loss":
            axes.legend(frameon=False, loc="best", fontsize=9)
    return figure


def _table(what: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    if not rows:
        return "<p>None.</p>"
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in (what, *names))
    lines = []
    for key, cells in rows.items():
        texts = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{html.escape(key)}</th>{texts}</tr>')
    return scrolling(f"<tr>{heads}</tr>{''.join(lines)}", what)
