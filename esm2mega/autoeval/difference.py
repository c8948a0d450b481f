"""Computes intervals for the difference of two models that were measured on the same proteins.

Two things are left to chance. The proteins are a sample: all values are paired per protein, so that what is
hard for both models drops out. And training is one of many possible: runs that differ in their seed alone
show how much that moves a measure.

Legend: ``n`` proteins, ``k`` runs of the one side and ``m`` of the other, ``d`` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esm2mega.finetune.bootstrap import percentiles
from esm2mega.train.loop import defined

Array = npt.NDArray[np.float64]

LEVEL = 0.95
"""Is the level of all intervals."""


@dataclass(frozen=True)
class Difference:
    """Holds how the second side B differs from the first side A in one measure; None: not defined.

    Attributes:
        a: Mean over the runs of A.
        b: Mean over the runs of B.
        difference: B minus A.
        interval: Interval of the difference.
        seed_noise: Standard deviation between the runs of a side; None if each side is one run.
    """

    a: float | None
    b: float | None
    difference: float | None
    interval: tuple[float, float] | None
    seed_noise: float | None

    @property
    def is_shown(self) -> bool:
        """Return whether 0 lies outside of the interval."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]


def loss_difference(a: Array, b: Array, counts: npt.NDArray[np.int64]) -> Difference:
    """Compare the losses of two sides: global sums over global counts.

    The interval is Student's for a ratio of sums (the variance of ``d_i - D c_i`` over proteins, with ``d_i``
    the difference of the sums of a protein, ``c_i`` its labels, and D the difference of the losses). With
    equally many labels in every protein it is that of a paired t test.

    Args:
        a: Sum of the loss over the labels of each protein, of each run of A, ``[k, n]``.
        b: The same of B, ``[m, n]``.
        counts: Number of labels of each protein, ``[n]``; proteins without labels do not count.
    """
    total, n = counts.sum(), int(np.count_nonzero(counts))
    if not n:
        return Difference(None, None, None, None, None)
    each = b.mean(axis=0) - a.mean(axis=0)
    difference = float(each.sum() / total)
    squares = np.square(each - difference * counts).sum() / float(total) ** 2
    variance = float(squares) * n / (n - 1) if n > 1 else math.nan
    return _with_seeds(a.sum(axis=1) / total, b.sum(axis=1) / total, difference, variance, n)


def metric_difference(
    a: Sequence[float], b: Sequence[float], resampled_a: Array, resampled_b: Array, n: int
) -> Difference:
    """Compare a metric of two sides, which need be no mean over proteins.

    The interval is that of the paired bootstrap over proteins: percentiles of the difference for one run on
    each side; for several, Student's with the standard deviation of the resamples.

    Args:
        a: The metric of each run of A, k numbers; NaN where it is not defined.
        b: The same of B, m numbers.
        resampled_a: The metric in resamples of the proteins, ``[k, d]``.
        resampled_b: The metric in the same resamples, ``[m, d]``.
        n: Number of proteins.
    """
    of_a, of_b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    draws = resampled_b.mean(axis=0) - resampled_a.mean(axis=0)
    draws = draws[~np.isnan(draws)]
    variance = float(draws.var(ddof=1)) if n > 1 and len(draws) > 1 else math.nan
    limits = percentiles(draws) if len(of_a) == len(of_b) == 1 else None
    return _with_seeds(of_a, of_b, float(of_b.mean() - of_a.mean()), variance, n, limits)


def _with_seeds(
    a: Array,
    b: Array,
    difference: float,
    variance: float,
    n: int,
    limits: tuple[float, float] | None = None,
) -> Difference:
    """Add the noise between seeds to that of the proteins.

    Args:
        a: The measure of each run of A, ``[k]``.
        b: The measure of each run of B, ``[m]``.
        difference: Difference of the means.
        variance: Variance of the difference by the choice of n proteins.
        n: Number of proteins.
        limits: Interval to take if there is one run on each side; None for Student's.
    """
    of_a, of_b = float(a.mean()), float(b.mean())
    if not math.isfinite(difference):
        return Difference(defined(of_a), defined(of_b), None, None, None)
    # As in Student's test of two samples: both sides share one variance, to which each run adds knowledge.
    freedom = len(a) + len(b) - 2
    squares = float(np.square(a - of_a).sum() + np.square(b - of_b).sum())
    noise = math.sqrt(squares / freedom) if freedom else None
    if math.isnan(variance):
        return Difference(of_a, of_b, difference, None, noise)
    of_seeds = 0.0 if noise is None else noise**2 * (1 / len(a) + 1 / len(b))
    if limits is None:
        half = _half_width(variance, n - 1, of_seeds, freedom)
        limits = (difference - half, difference + half)
    return Difference(of_a, of_b, difference, limits, noise)


def _half_width(variance: float, freedom: int, of_seeds: float, freedom_of_seeds: int) -> float:
    """Return half the width of Student's interval for a sum of two variances (Welch and Satterthwaite)."""
    from scipy.stats import t

    total = variance + of_seeds
    if total == 0.0:
        return 0.0
    shares = (variance / total) ** 2 / freedom
    if freedom_of_seeds:
        shares += (of_seeds / total) ** 2 / freedom_of_seeds
    return float(t.ppf((1 + LEVEL) / 2, 1 / shares)) * math.sqrt(total)
