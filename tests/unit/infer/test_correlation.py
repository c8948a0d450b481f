"""Rank correlation and ProteinGym's mean, against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from esm2mega.infer.correlation import spearman
from esm2mega.infer.proteingym import mean_of_means


@pytest.mark.parametrize("distinct", [3, 20, 10**6])
def test_equals_scipy_with_and_without_ties(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    a, b = rng.integers(0, distinct, (2, 200))
    b = b + a // 2
    assert spearman(a, b) == spearmanr(a, b).statistic


def test_scores_are_ranked_as_scipy_ranks_them() -> None:
    rng = np.random.default_rng(0)
    for n in range(2, 60):
        a, b = rng.normal(size=(2, n))
        assert spearman(a, b) == spearmanr(a, b).statistic


def test_no_variation_has_no_correlation() -> None:
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([], []))
    assert math.isnan(spearman([1, math.nan, 2], [1, 2, 3]))


def test_proteins_and_classes_weigh_the_same_whatever_their_assays() -> None:
    values = [
        ("stability", "P1", 0.2),
        ("stability", "P1", 0.4),
        ("stability", "P2", 0.9),
        ("binding", "P1", 0.1),
    ]
    assert abs(mean_of_means(values) - ((0.3 + 0.9) / 2 + 0.1) / 2) < 1e-15
