"""Spearman's rank correlation, with ties, as benchmarks of variant effects report it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Correlation of the ranks, equal values sharing their mean rank; NaN where one side does not vary.

    Args:
        first, second: n finite numbers each.
    """
    a, b = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else math.nan


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1, [n]."""
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[groups]
