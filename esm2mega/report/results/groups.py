"""Groups points by their labels, each group with a colour: classes, or ranges of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esm2mega.report.results.charts import COLORS, GREY, RAMP
from esm2mega.report.results.predictions import Array

MISSING = "none"
"""Is the label of what has none."""

NO_NUMBER = "no number"
"""Is the label of words in a column of numbers, such as ``n.d.`` or ``>100``."""


def groups_of(labels: Sequence[str]) -> list[tuple[str, str, Array]]:
    """Return colour, name and rows of each label; of numbers in ranges of equal size, rare ones together.

    Labels of which more than half are numbers are numbers. What is none, or is `MISSING`, is a group of its
    own, in grey, and does not count among the others.
    """
    missing = np.array([label == MISSING for label in labels], dtype=bool)
    there = np.flatnonzero(~missing)
    found = _groups_of_known([labels[row] for row in there.tolist()]) if len(there) else []
    known = [(color, name, there[rows]) for color, name, rows in found]
    return [*known, *[(GREY, MISSING, np.flatnonzero(missing))] * bool(missing.any())]


def _groups_of_known(labels: Sequence[str]) -> list[tuple[str, str, Array]]:
    numbers = as_numbers(labels)
    if numbers is None:
        names, rows = np.unique(labels, return_inverse=True)
        chosen, left_out = most_frequent(np.bincount(rows))
        found = [
            (color, str(names[n]), np.flatnonzero(rows == n))
            for color, n in zip(COLORS, chosen, strict=False)
        ]
        return [*found, *[(GREY, "others", np.flatnonzero(~np.isin(rows, chosen)))] * left_out]
    words = np.flatnonzero(np.isnan(numbers))
    others = [(GREY, NO_NUMBER, words)] * bool(len(words))
    known = numbers[~np.isnan(numbers)]
    values = np.unique(known)
    if len(values) <= len(RAMP):
        colors = zip(RAMP, values.tolist(), strict=False)
        found = [(color, f"{value:.4g}", np.flatnonzero(numbers == value)) for color, value in colors]
        return [*found, *others]
    ends = np.unique(np.quantile(known, np.linspace(0, 1, len(RAMP) + 1)))
    ranges = np.clip(np.searchsorted(ends, numbers, side="right"), 1, len(ends) - 1)
    ranges[words] = 0
    found = [
        (RAMP[n - 1], f"{ends[n - 1]:.3g} to {ends[n]:.3g}", np.flatnonzero(ranges == n))
        for n in range(1, len(ends))
    ]
    return [*found, *others]


def as_numbers(labels: Sequence[str]) -> Array | None:
    """Return labels as numbers, NaN for those that are none; None where these are half of them or more."""
    numbers = np.array([_number(label) for label in labels])
    return numbers if 2 * np.isnan(numbers).sum() < len(numbers) else None


def _number(label: str) -> float:
    try:
        number = float(label)
    except ValueError:
        return np.nan
    return number if np.isfinite(number) else np.nan


def most_frequent(counts: Array) -> tuple[list[int], bool]:
    """Return the most frequent classes, as many as there are colours, and whether others are left out."""
    order = np.argsort(-counts, kind="stable").tolist()
    return order[: len(COLORS)], len(order) > len(COLORS)
