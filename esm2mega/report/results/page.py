"""Writes `results.html`: every number of a suite with its interval, what stands beside it, and pictures.

The page is one file without scripts and without anything from elsewhere. All text in it is escaped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from esm2mega.files import OTHER_OUT, replacing
from esm2mega.report.results.charts import COLORS, GREY, Plot, axis_of, breakable, scrolling
from esm2mega.report.results.pictures import pictures_of
from esm2mega.report.results.rows import best_of, differences, overview, rows_of, slug_of
from esm2mega.report.results.suite import MALFORMED, Suite, no_results
from esm2mega.report.style import page_of

PAGE = "results.html"

CurvePoint = tuple[int, float, float, float]
"""Holds a step, and a value with the ends of its interval."""


def write_results_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the page of a suite.

    Args:
        results: Content of ``results.json``.
        folder: Folder of the results, with the files of predictions.

    Returns:
        Path of the page.
    """
    body = f"<h1>Benchmarks</h1>\n{_sections(results, folder, None)}"
    footer = (
        f"esm2mega {escape(results['esm2mega'])}, seed {results['seed']}. Lines over bars are 95 % "
        "intervals by resampling the test proteins. Rows in italics cannot be compared with the others; the "
        "note says why."
    )
    with replacing(folder / PAGE, OTHER_OUT) as partial:
        partial.write_text(page_of("Benchmarks", body, footer), encoding="utf-8")
    return folder / PAGE


def sections_of(suite: Suite, first: str) -> str:
    """Return what the page of a suite shows, for another page.

    Args:
        suite: The results.
        first: Name of the model whose pictures come first; those of the others are folded.

    Raises:
        UserError: A file of the suite is missing or damaged.
    """
    try:
        return _sections(suite.results, suite.folder, first)
    except MALFORMED as error:
        raise no_results(suite.named, error) from None


def _sections(results: Mapping[str, Any], folder: Path, first: str | None) -> str:
    tasks = [_task(task, results, folder, first) for task in results["tasks"]]
    return "\n".join([_models(results), overview(results), *tasks])


def _models(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{breakable(model["name"])}</th><td>{_count(model["parameters"])}</td>'
        f"<td>{'' if model['step'] is None else format(model['step'], ',')}</td>"
        f"<td>{escape(model['checkpoint'])}</td><td><code>{escape(model['weights_sha256'][:12])}</code></td></tr>"
        for model in results["models"]
    )
    names = ("model", "parameters", "step", "checkpoint", "SHA-256 of the weights")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return scrolling(f"<tr>{heads}</tr>{rows}", "Models")


def _task(task: Mapping[str, Any], results: Mapping[str, Any], folder: Path, first: str | None) -> str:
    parts = [
        f'<section id="{slug_of(task)}"><h2>{escape(task["task"])}</h2>',
        *(f"<p>{fact}</p>" for fact in _facts(task)),
        rows_of(task),
        differences(task),
        *_pictures(task, results, folder, first),
        _commands(task),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _facts(task: Mapping[str, Any]) -> Iterator[str]:
    metric = escape(task["metric"]) + ", less is better" * task["less_is_better"]
    counts = ", ".join(f"{count:,} {escape(split)}" for split, count in task["num_proteins"].items())
    yield f"Metric: {metric}." + f" Proteins: {counts}." * bool(counts)
    if task["limited"]:
        yield "Fewer proteins than published, chosen by the seed: not the benchmark itself."
    if task.get("first_residues") is not None:
        yield f"The first {task['first_residues']} residues of each protein."
    if (leakage := task["leakage"]) is not None:
        by = f"({escape(leakage['method'])}, identity from {leakage['threshold']:.0%})"
        if not leakage["pairs"]:
            yield f"Leakage: no related proteins in different splits {by}."
        else:
            splits = ", ".join(
                f"{escape(pair)} {count:,}" for pair, count in leakage.get("splits", {}).items()
            )
            proteins = f"; {leakage['proteins']:,} proteins have one" if "proteins" in leakage else ""
            yield (
                f"Leakage: {leakage['pairs']:,} pairs of related proteins in different splits {by}"
                + f": {splits}" * bool(splits)
                + f"{proteins}."
            )


def _pictures(
    task: Mapping[str, Any], results: Mapping[str, Any], folder: Path, first: str | None
) -> Iterator[str]:
    """Yield the curve over steps, the pictures of the best row, and those of the others, folded.

    The best row is that of the model `first`, if one is named and has pictures.
    """
    models = [row for row in task["rows"] if row["row"] == "model"]
    drawn_of = [row for row in models if row["predictions"]]
    of_first = [row for row in drawn_of if row["model"] == first]
    best = best_of(of_first or drawn_of, task["less_is_better"])
    heading = "Checkpoint" if of_first else "Best row"
    curve = _curves(models, task, results)
    for row in sorted(models, key=lambda row: row is not best):
        drawn = "".join([curve if row is best else "", *pictures_of(row, task["kind"], folder)])
        title = f"{escape(row['model'])}, {escape(row['mode'])}"
        if row is best:
            yield f'<h3>{heading}: {title}</h3>\n<div class="pictures">{drawn}</div>'
        elif drawn:
            inside = f'<div class="pictures">{drawn}</div>'
            yield f"<details><summary>Pictures of {title}</summary>{inside}</details>"
    if best is None and curve:
        yield f'<div class="pictures">{curve}</div>'


def _curves(models: Sequence[Mapping[str, Any]], task: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the chart of the modes in which several models have a step and a value; else nothing."""
    steps = {model["name"]: model["step"] for model in results["models"]}
    found: dict[str, list[CurvePoint]] = defaultdict(list)
    for row in models:
        step, value = steps[row["model"]], row["value"]
        if step is not None and value is not None:
            low, high = (value if row[name] is None else row[name] for name in ("low", "high"))
            found[row["mode"]].append((step, value, low, high))
    found = {mode: points for mode, points in found.items() if len({point[0] for point in points}) > 1}
    if not found:
        return ""
    known = best_of([row for row in task["rows"] if row["row"] == "baseline"], task["less_is_better"])
    level = [] if known is None else [known["value"]]
    points = [point for each in found.values() for point in each]
    plot = Plot(
        axis_of("pretraining step", [point[0] for point in points]),
        axis_of(task["metric"], [*level, *(number for point in points for number in point[1:])]),
    )
    for color, (mode, each) in zip(COLORS, found.items(), strict=False):
        x, values, lows, highs = zip(*sorted(each), strict=True)
        plot.band(x, lows, highs, color)
        plot.line(x, values, color)
        plot.dots(x, values, color)
        plot.label(color, mode)
    if known is not None:
        plot.line([plot.x.low, plot.x.high], level * 2, GREY, dashed=True)
        plot.label(GREY, f"best baseline: {known['baseline']}")
    return plot.figure(f"{task['metric']} over pretraining", "the band is the 95 % interval")


def _commands(task: Mapping[str, Any]) -> str:
    lines = dict.fromkeys(command for row in task["rows"] for command in row.get("commands", ()))
    text = escape("\n".join(lines))
    return f'<details><summary>Commands</summary><pre tabindex="0">{text}</pre></details>' if lines else ""


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"
