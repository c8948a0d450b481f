"""Intervals of differences: SciPy's on the same values, and they hold the truth as often as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from esm2mega.autoeval.difference import Difference, loss_difference, metric_difference

stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed: pip install esm2mega[finetune]")


def _pairs(rng: np.random.Generator, n: int, runs: tuple[int, int], effect: float, spread: float) -> Any:
    """Sums of the loss of n proteins for the runs of both sides, and the numbers of labels.

    Proteins differ in how hard they are, in how much B is better at them (by `effect` on average over the
    labels, more in long ones), and each run is shifted by its seed.
    """
    counts = rng.integers(1, 60, n)
    hard = rng.normal(2.5, 0.5, n)
    gain = effect + 0.002 * (counts - (np.arange(1, 60) ** 2).sum() / np.arange(1, 60).sum())
    sides = []
    for k, change in ((runs[0], 0.0), (runs[1], gain)):
        seeds = rng.normal(0.0, spread, (k, 1))
        noise = rng.normal(0.0, 0.4, n) / np.sqrt(counts)
        sides.append((hard + change + noise + seeds) * counts)
    return sides[0], sides[1], counts


def _bounds(found: Difference) -> tuple[float, float]:
    assert found.interval is not None
    return found.interval


def test_with_equal_counts_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    a, b, _ = _pairs(rng, 25, (1, 1), -0.1, 0.0)
    counts = np.full(25, 7)
    found = loss_difference(a, b, counts)
    expected = stats.ttest_rel(b[0] / 7, a[0] / 7).confidence_interval(0.95)
    assert _bounds(found) == pytest.approx((expected.low, expected.high), abs=1e-14)
    assert found.difference == pytest.approx(np.mean(b[0] - a[0]) / 7, abs=1e-14)
    assert found.seed_noise is None


def test_with_unequal_counts_it_is_near_the_paired_bootstrap() -> None:
    """Not near that of the means per protein, which weighs a short protein like a long one."""
    rng = np.random.default_rng(2)
    a, b, counts = _pairs(rng, 800, (1, 1), -0.05, 0.0)
    low, high = _bounds(loss_difference(a, b, counts))
    expected = stats.bootstrap(
        (a[0], b[0], counts),
        lambda x, y, c, axis: (y.sum(axis=axis) - x.sum(axis=axis)) / c.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    # The error of a percentile of 4000 resamples is some 2 % of the width of the interval.
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05 * (high - low))
    per_protein = stats.ttest_rel(b[0] / counts, a[0] / counts).confidence_interval(0.95)
    assert abs(per_protein.low - low) > 0.2 * (high - low)


def test_without_noise_of_proteins_it_is_the_t_test_of_the_runs() -> None:
    """Every label of a run has the same loss: only the seeds differ."""
    a, b, counts = [2.0, 2.3, 2.1], [1.7, 1.9], np.array([3, 5, 9, 2])
    found = loss_difference(np.outer(a, counts), np.outer(b, counts), counts)
    expected = stats.ttest_ind(b, a).confidence_interval(0.95)
    assert _bounds(found) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (found.a, found.b) == pytest.approx((np.mean(a), np.mean(b)))
    pooled = (2 * np.var(a, ddof=1) + np.var(b, ddof=1)) / 3
    assert found.seed_noise == pytest.approx(np.sqrt(pooled))


def test_one_run_may_be_compared_with_several() -> None:
    a, counts = [2.0, 2.3, 2.1], np.array([3, 5, 9, 2])
    low, high = _bounds(loss_difference(np.outer(a, counts), np.outer([1.0], counts), counts))
    half = stats.t.ppf(0.975, 2) * np.std(a, ddof=1) * np.sqrt(1 / 3 + 1)
    center = 1.0 - np.mean(a)
    assert (low, high) == pytest.approx((center - half, center + half), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "runs", "spread"),
    [(20, (1, 1), 0.0), (100, (1, 1), 0.0), (40, (3, 3), 0.05), (40, (2, 4), 0.05), (40, (3, 3), 0.005)],
)
def test_the_interval_holds_the_truth(n: int, runs: tuple[int, int], spread: float) -> None:
    """In 95 % of 600 simulations, with a standard error of 0.9 %; small samples of ratios lose a little."""
    rng = np.random.default_rng(5)
    truth = -0.03
    inside, shown_without_effect = 0, 0
    for _ in range(600):
        low, high = _bounds(loss_difference(*_pairs(rng, n, runs, truth, spread)))
        inside += low <= truth <= high
        shown_without_effect += loss_difference(*_pairs(rng, n, runs, 0.0, spread)).is_shown
    assert 0.92 <= inside / 600 <= 0.985
    assert shown_without_effect / 600 <= 0.08


def test_one_run_each_does_not_know_the_noise_between_seeds() -> None:
    """The interval of two runs holds the difference of these runs, not that of their seeds on average."""
    rng = np.random.default_rng(6)
    shown = sum(loss_difference(*_pairs(rng, 100, (1, 1), 0.0, 0.3)).is_shown for _ in range(200))
    assert shown > 150
    several = sum(loss_difference(*_pairs(rng, 100, (3, 3), 0.0, 0.3)).is_shown for _ in range(200))
    assert several < 25


def test_the_same_is_no_difference() -> None:
    a, _, counts = _pairs(np.random.default_rng(7), 30, (3, 3), 0.0, 0.1)
    alone = loss_difference(a[:1], a[:1], counts)
    assert (alone.difference, alone.interval, alone.is_shown) == (0.0, (0.0, 0.0), False)
    several = loss_difference(a, a, counts)
    assert several.difference == 0.0 and not several.is_shown
    assert several.interval is not None and several.interval[0] < 0.0 < several.interval[1]


def test_what_is_not_defined_is_none() -> None:
    nothing = np.zeros((1, 4))
    assert loss_difference(nothing, nothing, np.zeros(4, dtype=np.int64)) == Difference(*[None] * 5)
    one = loss_difference(np.array([[3.0, 0.0]]), np.array([[1.0, 0.0]]), np.array([2, 0]))
    assert (one.a, one.b, one.difference, one.interval) == (1.5, 0.5, -1.0, None) and not one.is_shown
    diverged = loss_difference(np.array([[3.0, np.nan]]), np.array([[1.0, 1.0]]), np.array([2, 2]))
    assert (diverged.a, diverged.b, diverged.difference, diverged.interval) == (None, 0.5, None, None)
    undefined = metric_difference([np.nan], [0.5], np.full((1, 9), np.nan), np.full((1, 9), 0.5), 9)
    assert (undefined.a, undefined.b, undefined.difference, undefined.interval) == (None, 0.5, None, None)


def test_a_metric_has_the_percentiles_of_its_resamples() -> None:
    """Resamples in which it is not defined do not count."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(0.5, 0.1, (1, 500)), rng.normal(0.6, 0.1, (1, 500))
    a[0, :20] = np.nan
    found = metric_difference([0.5], [0.62], a, b, 40)
    assert found.difference == pytest.approx(0.12)
    assert _bounds(found) == pytest.approx(tuple(np.percentile((b - a)[0, 20:], [2.5, 97.5])), abs=1e-14)


def test_a_metric_of_several_runs_has_both_kinds_of_noise() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.normal(0.5, 0.02, (3, 500)), rng.normal(0.6, 0.02, (3, 500))
    values = [0.48, 0.5, 0.53], [0.61, 0.6, 0.62]
    found = metric_difference(*values, a, b, 10**6)
    of_proteins = (b.mean(axis=0) - a.mean(axis=0)).var(ddof=1)
    pooled = (np.var(values[0], ddof=1) + np.var(values[1], ddof=1)) / 2
    of_seeds = pooled * 2 / 3
    total = of_proteins + of_seeds
    half = stats.t.ppf(0.975, total**2 / (of_seeds**2 / 4 + of_proteins**2 / (10**6 - 1))) * np.sqrt(total)
    low, high = _bounds(found)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-12)
    assert found.seed_noise == pytest.approx(np.sqrt(pooled))
