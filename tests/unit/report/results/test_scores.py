"""Curves of scores are those of scikit-learn, and calibration is that done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from esm2mega.report.results.predictions import Numbers
from esm2mega.report.results.scores import coverage, precision_recall, reliability, roc


@pytest.fixture(scope="module")
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    known = rng.random(3000) < 0.3
    return known, 1 / (1 + np.exp(-rng.normal(0, 1, 3000) - known))


def test_areas_are_of_all_points(scored: tuple[np.ndarray, np.ndarray]) -> None:
    found, other = roc(*scored), precision_recall(*scored)
    assert found is not None and other is not None
    assert found.value == roc_auc_score(*scored) and other.value == average_precision_score(*scored)
    assert len(found.x) <= 200 and len(other.x) <= 200
    # What is drawn leaves points out, a 200th of the axis between them.
    assert auc(found.x, found.y) == pytest.approx(found.value, abs=0.005)
    assert (found.x[0], found.y[0], found.x[-1], found.y[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize("known", [np.ones(4, bool), np.zeros(4, bool)])
def test_one_outcome_alone_has_no_curve(known: np.ndarray) -> None:
    assert roc(known, np.arange(4.0)) is None and precision_recall(known, np.arange(4.0)) is None


def test_reliability(scored: tuple[np.ndarray, np.ndarray]) -> None:
    known, scores = scored
    scores = scores.copy()
    scores[:3] = 0.1, 0.0, 1.0  # the ends of bins
    found = reliability(known, scores)
    shares, said = calibration_curve(known, scores, n_bins=10)
    np.testing.assert_allclose(found.x, said, atol=1e-12)
    np.testing.assert_allclose(found.y, shares, atol=1e-12)
    error = 0.0
    for number in range(10):
        first, last = number / 10, (number + 1) / 10
        inside = (scores > first) & (scores <= last) | ((number == 0) & (scores == 0))
        if inside.any():
            error += inside.mean() * abs(known[inside].mean() - scores[inside].mean())
    # Only the order of sums differs.
    assert found.value == pytest.approx(error, abs=1e-12)


def test_coverage_of_intervals() -> None:
    rng = np.random.default_rng(4)
    sd = rng.gamma(2, 1, 20_000)
    half, labels = norm.ppf(0.975) * sd, rng.normal(0, sd)
    numbers = Numbers("", [""] * len(sd), labels, np.zeros(len(sd)), -half, half)
    found = coverage(numbers)
    assert found is not None and found.value == np.mean(np.abs(labels) <= half)
    # Five standard errors of a share of 20,000.
    np.testing.assert_allclose(found.y, found.x, atol=5 * 0.5 / 20_000**0.5)
    assert coverage(Numbers("", ["a"], np.ones(1), np.ones(1))) is None
    assert coverage(Numbers("", ["a"], np.ones(1), np.ones(1), np.ones(1), np.ones(1))) is None, "no width"
