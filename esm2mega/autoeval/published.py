"""Gives the published figures of a benchmark task, each with its source and what keeps it from comparison."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TABLE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class PublishedFigure:
    """Holds one published figure.

    Attributes:
        model: The model.
        mode: How it was used, as far as the source says; None where there is nothing to say.
        metric: The metric, by the name that `esm2mega evaluate` gives it.
        value: Its value; accuracies and precisions as fractions.
        source: Where it was read.
        caveat: What the reader has to know, and where it is not comparable, why; None for nothing.
        comparable: Whether it is the asked metric on the same test proteins.
    """

    model: str
    mode: str | None
    metric: str
    value: float
    source: str
    caveat: str | None
    comparable: bool


def published_figures(task: str, metric: str) -> list[PublishedFigure]:
    """Return the figures of a task, the comparable ones first; empty where none is published.

    Args:
        task: Name of the task with its split, such as ``tape/stability:test``.
        metric: The metric of one's own figures. Those in another are returned too, as not comparable.
    """
    figures = [_figure(row, metric) for row in table() if row["task"] == task]
    return sorted(figures, key=lambda figure: not figure.comparable)


@cache
def table() -> list[dict[str, str]]:
    """Return the rows of the table in the package."""
    with _TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def _figure(row: dict[str, str], metric: str) -> PublishedFigure:
    caveat, is_other = row["caveat"], row["metric"] != metric
    if is_other and row["comparable"] == "yes":
        caveat = "; ".join(filter(None, [f"{row['metric']}, in place of {metric}", caveat]))
    return PublishedFigure(
        *(row["model"], row["mode"] or None, row["metric"], float(row["value"])),
        row["source"],
        caveat or None,
        row["comparable"] == "yes" and not is_other,
    )
