"""Computes Spearman's rank correlation, with ties, bit for bit as `scipy.stats.spearmanr` does.

`esm2mega score` needs it where SciPy, an optional dependency, may not be installed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Correlate the ranks of two samples, equal values sharing their mean rank.

    Args:
        first: Numbers, ``[n]``.
        second: Numbers, ``[n]``.

    Returns:
        The correlation; NaN where there is none, as for constants and for samples that hold a NaN.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if not varied(a, b):
        return math.nan
    ranks = np.column_stack((_ranks(a), _ranks(b)))  # [n, 2]
    return float(np.asarray(np.corrcoef(ranks, rowvar=False))[1, 0])


def varied(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> bool:
    """Return whether two samples, ``[n]``, both vary, so that they have a correlation."""
    return len(first) > 1 and bool(np.ptp(first) > 0 and np.ptp(second) > 0)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ranks from 1 on, ``[n]``; equal values share their mean rank."""
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[groups]
