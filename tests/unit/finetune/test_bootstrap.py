"""Intervals of the headline metric, which has a short way of its own, are those of all metrics together."""

from __future__ import annotations

import numpy as np
import pytest

from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.bootstrap import bootstrap_headline, bootstrap_metrics
from esm2mega.finetune.metrics import Predictions

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")


def test_the_f1_of_resamples_is_that_of_scikit_learn() -> None:
    """Also where no flag is 1 or predicted, where none is known, and of a class without labels."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, (4, 3)).astype(float)
    labels[0], labels[1], labels[3, 1] = np.nan, 0.0, np.nan
    values = rng.uniform(size=(4, 3))
    values[:2] = 0.1
    info = TargetInfo("multilabel", ["a", "b", "c"], untrained=[2])
    found = Predictions(np.arange(4), None, values, labels)
    # Of this seed, draws of the first two proteins alone are among so many.
    expected = bootstrap_metrics(found, info, 40, 5)["f1_micro"]
    assert np.isnan(expected).any() and (expected == 0).any() and len(np.unique(expected)) > 5
    np.testing.assert_allclose(bootstrap_headline(found, info, 40, 5), expected, rtol=0, atol=1e-12)


def test_the_correlation_of_resamples_is_the_same_to_the_bit() -> None:
    """Also where a label is missing, and where all that are drawn are equal."""
    rng = np.random.default_rng(4)
    labels, values = np.array([[1.0], [1.0], [np.nan], [2.0]]), rng.normal(size=(4, 1))
    found, info = Predictions(np.arange(4), None, values, labels), TargetInfo("regression", ["y"])
    expected = bootstrap_metrics(found, info, 40, 5)["spearman"]
    assert np.isnan(expected).any() and len(np.unique(expected)) > 3
    np.testing.assert_array_equal(bootstrap_headline(found, info, 40, 5), expected)
