"""Draws the folds of a cross-validation over each other, and predictions of proteins not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esm2mega.report.decimals import four_decimals
from esm2mega.report.fold_dirs import CURE, SUMMARY, fold_dirs, read_summary
from esm2mega.report.overlay import plot_runs
from esm2mega.report.predicted import TEST_RESULT, pictures_of_results, read_tested
from esm2mega.report.results.charts import table
from esm2mega.report.run_records import read_config


def plot_folds(folder: str | Path, out: str | Path | None = None) -> list[str]:
    """Draw the folds of a finished cross-validation.

    Args:
        folder: Directory of the cross-validation.
        out: Directory for the files, which is made if it is absent; None for that of the cross-validation.

    Returns:
        The paths of the PNG and of the HTML file.

    Raises:
        UserError: A file is missing or damaged, or a fold has nothing to draw.
    """
    folder = Path(folder)
    runs = fold_dirs(folder)
    sections = [f"<h2>Over the folds</h2>\n{_metrics(read_summary(folder / SUMMARY)['metrics'])}"]
    kind = read_config(runs[0]).get("task.kind", "")
    tests = [read_tested(run / TEST_RESULT, kind, f"remove it, and {CURE}") for run in runs]
    there = [test for test in tests if test is not None]
    if pictures := pictures_of_results(there, kind):
        missing = f"<p>Of {len(there)} of {len(tests)} folds: the others have no {TEST_RESULT}.</p>\n"
        sections.append(
            "<h2>Predictions of proteins that were not trained on</h2>\n"
            f"{missing if len(there) < len(tests) else ''}{pictures}"
        )
    return plot_runs(runs, folder if out is None else out, "\n".join(sections))


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the metrics: mean, standard deviation, and the value of every fold."""
    if not metrics:
        return "<p>No metric is defined.</p>"
    count = max(len(found["values"]) for found in metrics.values())
    heads = ["metric", "mean", "standard deviation", *(f"fold {number}" for number in range(1, count + 1))]
    rows = [
        [name, *map(_shown, (found.get("mean"), found.get("std"), *found["values"]))]
        for name, found in metrics.items()
    ]
    return table("Metrics of the folds", heads, rows, is_wide=True)


def _shown(value: float | None) -> str:
    return "" if value is None else four_decimals(value)
