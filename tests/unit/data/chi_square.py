"""Chi-square checks for the random numbers of the data pipeline."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def assert_matches(counts: npt.ArrayLike, probabilities: npt.ArrayLike) -> None:
    """Fails when `counts` lie further from `probabilities` than five standard deviations of chance.

    The draws are fixed by a seed: a test passes always or never.
    """
    observed = np.asarray(counts, dtype=np.float64).ravel()
    expected = np.asarray(probabilities, dtype=np.float64).ravel() * observed.sum()
    assert expected.min() >= 5, "too few draws for the chi-square approximation"
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 10, (
        f"chi-square {statistic:.1f} for {freedom} degrees"
    )


def assert_uniform(counts: npt.ArrayLike) -> None:
    """Fails when `counts` differ by more than chance allows."""
    size = np.size(counts)
    assert_matches(counts, np.full(size, 1 / size))
