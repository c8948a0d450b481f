"""Computes the curves by which scores are judged: ROC, precision-recall, and calibration.

Legend: ``n`` proteins or residues, ``b`` bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.report.results.predictions import Array, Numbers

NUM_BINS = 10
_MOST_POINTS = 200
_LEVELS = np.arange(0.05, 1.0, 0.05)
_INTERVAL = 0.95


@dataclass(frozen=True)
class ScoreCurve:
    """Holds a curve, and the number that sums it up.

    Attributes:
        x: Values of the axis across, ``[b]``.
        y: Values of the axis upwards, ``[b]``.
        value: Area, average precision or error of calibration, of all points.
    """

    x: Array
    y: Array
    value: float


def roc(known: npt.NDArray[np.bool_], scores: Array) -> ScoreCurve | None:
    """Return the true over the false positive rate; None where not both outcomes occur.

    Args:
        known: Whether each is positive, ``[n]``.
        scores: Score of each, ``[n]``.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    if known.all() or not known.any():
        return None
    false, true, _ = roc_curve(known, scores)
    return _thinned(false, true, roc_auc_score(known, scores))


def precision_recall(known: npt.NDArray[np.bool_], scores: Array) -> ScoreCurve | None:
    """Return the precision over the recall; None where not both outcomes occur."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    if known.all() or not known.any():
        return None
    precision, recall, _ = precision_recall_curve(known, scores)
    return _thinned(recall, precision, average_precision_score(known, scores))


def reliability(is_right: npt.NDArray[np.bool_], confidence: Array) -> ScoreCurve:
    """Return how often predictions are right in `NUM_BINS` equal bins of their probability.

    The value is the expected calibration error: the mean over predictions of how far the share that is right
    in their bin lies from the mean probability there.
    """
    bins = np.searchsorted(np.linspace(0, 1, NUM_BINS + 1)[1:-1], confidence)
    counts = np.bincount(bins, minlength=NUM_BINS)
    right = np.bincount(bins, is_right, NUM_BINS)
    said = np.bincount(bins, confidence, NUM_BINS)
    there = counts > 0
    error = float(np.abs(right - said).sum() / max(len(confidence), 1))
    return ScoreCurve(said[there] / counts[there], right[there] / counts[there], error)


def coverage(numbers: Numbers) -> ScoreCurve | None:
    """Return the share of labels within the intervals of each level; None without intervals.

    The file has the intervals of 95 %; those of other levels are as wide as a normal distribution with the
    same 95 % has them. The value is the share within the intervals of the file.
    """
    from scipy.stats import norm

    if numbers.low is None or numbers.high is None:
        return None
    half = (numbers.high - numbers.low) / 2
    off = np.abs(numbers.labels - (numbers.low + numbers.high) / 2)
    if not (half > 0).any():
        return None
    # Intervals without width hold what lies in their middle alone.
    ratio = np.where(off == 0, 0.0, np.inf)
    np.divide(off, half, out=ratio, where=half > 0)
    widths = norm.ppf((1 + _LEVELS) / 2) / norm.ppf((1 + _INTERVAL) / 2)
    shares = (ratio[:, None] <= widths).mean(axis=0)
    inside = (numbers.labels >= numbers.low) & (numbers.labels <= numbers.high)
    return ScoreCurve(_LEVELS, shares, float(inside.mean()))


def _thinned(x: Array, y: Array, value: Any) -> ScoreCurve:
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(np.int64))
    return ScoreCurve(x[chosen], y[chosen], float(value))
