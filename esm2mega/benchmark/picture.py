"""Draws what a benchmark measured as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm2mega.benchmark.breakdown import PHASES
from esm2mega.benchmark.contenders import OURS
from esm2mega.benchmark.turns import spread
from esm2mega.report.figure import AXIS_COLOR, TASK_COLORS, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS_COLOR, PEER_COLOR = TASK_COLORS[0], TASK_COLORS[1]


def draw_benchmark(result: Mapping[str, Any], path: Path) -> None:
    """Draw rates of training and embedding, products, and the parts of a step as PNG."""
    # Not pyplot: no global state and no display.
    from matplotlib.figure import Figure

    training, embedding = (result[name]["rows"] for name in ("training", "embedding"))
    peaks = [row for row in result["machine"]["products"] if row["is_peak"]]
    rows = max(len(training), len(embedding))
    chosen, here = result["settings"], result["conditions"]
    below = max(len(peaks), len(result["steps"]))
    size = (11, 3.2 + 0.34 * (rows + below))
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    device = here["processor"] if here["device"] == "cpu" else here["device"]
    title = f"ESM-2 {chosen['model']} on {device}, {here['threads']} thread{'s' * (here['threads'] > 1)}"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
    grid = figure.add_gridspec(2, 2, height_ratios=[rows + 2, below + 2])
    for column, (name, contest) in enumerate((("Training", training), ("Embedding", embedding))):
        labels = [f"{row['contender']} {row['precision']}" for row in contest]
        colors = [OURS_COLOR if row["contender"] == OURS else PEER_COLOR for row in contest]
        rates = [row["tokens_per_second"] for row in contest]
        _draw_rates(figure.add_subplot(grid[0, column]), f"{name} (real tokens / s)", labels, rates, colors)
    operations = [[rate / 1e9 for rate in row["operations_per_second"]] for row in peaks]
    labels = [row["precision"] for row in peaks]
    colors = [AXIS_COLOR] * len(peaks)
    title = "Fastest product (GFLOP / s; of int8 operations)"
    _draw_rates(figure.add_subplot(grid[1, 0]), title, labels, operations, colors)
    _draw_steps(figure.add_subplot(grid[1, 1]), result["steps"])
    path.write_bytes(png_of(figure))


def _draw_rates(
    axes: Axes, title: str, labels: Sequence[str], rates: Sequence[Sequence[float]], colors: Sequence[str]
) -> None:
    """Draw a bar for each median, with a line from the least to the greatest value."""
    found = [spread(values) for values in rates]
    middles = [one.median for one in found]
    ends = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
    places = list(range(len(labels)))
    axes.barh(places, middles, xerr=ends, color=colors, error_kw={"elinewidth": 1, "capsize": 3})
    for place, (middle, _, high) in enumerate(found):
        axes.annotate(f"{middle:,.0f}", (high, place), (6, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_steps(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    """Draw how steps are divided among their phases."""
    labels = [row["precision"] for row in steps]
    begin = [0.0] * len(steps)
    for phase, color in zip(PHASES, TASK_COLORS, strict=False):
        shares = [row["shares"][phase] for row in steps]
        axes.barh(labels, shares, left=begin, color=color, label=phase)
        begin = [at + share for at, share in zip(begin, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("Parts of a training step of esm2mega", fontsize=10, loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(PHASES), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
