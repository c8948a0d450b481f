"""The baselines are scikit-learn's dummies, fitted to the labels of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from esm2mega.config.schema import TaskConfig
from esm2mega.data.labels.dataset import proteins_of_pairs
from esm2mega.finetune.baseline import baseline_metrics
from esm2mega.finetune.metrics import Predictions

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
from sklearn import dummy, metrics

RNG = np.random.default_rng(2)


def found_for(labels: list[Any], tests: list[Any], width: int, **task: Any) -> dict[str, float]:
    """The baseline of `labels` on `tests`, whatever was predicted."""
    config = TaskConfig(**task)
    of_residues = task["kind"].startswith("token")

    def pairs(values: list[Any]) -> list[tuple[str, Any]]:
        lengths = [len(x if isinstance(x, str) else x[0]) if of_residues else 3 for x in values]
        return [("M" * length, x) for length, x in zip(lengths, values, strict=True)]

    _, info = proteins_of_pairs(pairs(labels), config, None, "train")
    proteins, _ = proteins_of_pairs(pairs(tests), config, info, "test")
    assert proteins.labels is not None
    rows = np.repeat(np.arange(len(tests)), proteins.lengths if info.per_residue else 1)
    values = RNG.normal(size=(len(rows), width))
    return baseline_metrics(Predictions(rows, None, values, proteins.labels), info)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_mean_of_training(scaled: bool) -> None:
    labels, tests = RNG.normal(5.0, 2.0, 30), RNG.normal(4.0, 1.0, 20)
    expected = dummy.DummyRegressor().fit(np.zeros((30, 1)), labels).predict(np.zeros((20, 1)))
    found = found_for(labels.tolist(), tests.tolist(), 1, kind="regression", scale_targets=scaled)
    assert found["baseline_mse"] == pytest.approx(metrics.mean_squared_error(tests, expected), rel=1e-12)
    assert found["baseline_r2"] == pytest.approx(metrics.r2_score(tests, expected), rel=1e-12)
    assert "baseline_spearman" not in found


def test_the_commonest_class_of_training() -> None:
    labels, tests = list("aabbbcb" * 3), list("abcca")
    model = dummy.DummyClassifier(strategy="most_frequent").fit(np.zeros((21, 1)), labels)
    predicted = model.predict(np.zeros((5, 1)))
    found = found_for(labels, tests, 3, kind="classification")
    assert found["baseline_accuracy"] == metrics.accuracy_score(tests, predicted)
    assert found["baseline_balanced_accuracy"] == pytest.approx(1 / 3)
    assert (found["baseline_auroc"], found["baseline_mcc"]) == (0.5, 0.0)
    residues = found_for(["aab", "bb"], ["ab", "aa", "a"], 2, kind="token_classification")
    assert residues["baseline_accuracy"] == pytest.approx(1 / 5)
    two: dict[str, Any] = {"kind": "token_classification", "target_columns": ["u", "v"]}
    assert residues["baseline_accuracy_per_protein"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    several = found_for([("aab", "xyy"), ("bb", "xx")], [("ab", "xx"), ("b", "x")], 4, **two)
    assert (several["baseline_accuracy/u"], several["baseline_accuracy/v"]) == (2 / 3, 1.0)


def test_flags_by_columns_and_by_names() -> None:
    """A flag is predicted where more than half of the training labels have it, missing ones aside."""
    labels = [("1", "0"), ("1", ""), ("0", "1"), ("1", "")]
    tests = [("1", "1"), ("0", "1"), ("0", "0"), ("1", "0")]
    found = found_for(labels, tests, 2, kind="multilabel", target_columns=["u", "v"])
    # u in 3 of 4, v in 1 of 2: both are predicted of all.
    assert found["baseline_accuracy"] == pytest.approx(4 / 8)
    names = found_for(["a", "a;b", "", "a"], ["a", "b", "", "a;b"], 2, kind="multilabel")
    assert names["baseline_accuracy"] == pytest.approx((2 + 2) / 8)
    assert names["baseline_f1_micro"] == pytest.approx(metrics.f1_score([1, 0, 0, 1, 0, 0, 1, 1], [1, 0] * 4))
