"""Metrics with labels missing, several targets and residues, by the formulas of SciPy and scikit-learn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.bootstrap import bootstrap_intervals
from esm2mega.finetune.metrics import Predictions, metrics_of, unseen_labels

stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed: pip install esm2mega[finetune]")
sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")

RNG = np.random.default_rng(1)


def test_regression_of_two_targets() -> None:
    labels, values = RNG.normal(size=(40, 2)), RNG.normal(size=(40, 2))
    values += labels
    labels[3:9, 1] = np.nan
    info = TargetInfo("regression", ["a", "b"])
    found = metrics_of(Predictions(np.arange(40), None, values, labels), info)
    for number, name in enumerate("ab"):
        there = ~np.isnan(labels[:, number])
        x, y = labels[there, number], values[there, number]
        assert found[f"spearman/{name}"] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert found[f"mse/{name}"] == pytest.approx(((x - y) ** 2).mean())
        assert found[f"r2/{name}"] == pytest.approx(1 - ((x - y) ** 2).sum() / ((x - x.mean()) ** 2).sum())
    assert found["pearson"] == pytest.approx((found["pearson/a"] + found["pearson/b"]) / 2)


def test_classes_that_are_missing_in_a_split() -> None:
    labels = np.array([0, 0, 3, 1, -100, 1, 0, 3])
    values = RNG.dirichlet(np.ones(4), size=8)
    info = TargetInfo("classification", list("wxyz"))
    found = metrics_of(Predictions(np.arange(8), None, values, labels), info)
    there = labels >= 0
    predicted = values.argmax(1)[there]
    assert found["accuracy"] == (predicted == labels[there]).mean()
    assert found["mcc"] == pytest.approx(sklearn.matthews_corrcoef(labels[there], predicted))
    areas = [sklearn.roc_auc_score(labels[there] == c, values[there, c]) for c in (0, 1, 3)]
    assert found["auroc"] == pytest.approx(np.mean(areas))


def test_residues_pooled_and_per_protein() -> None:
    rows = np.array([0, 0, 0, 0, 2, 2])
    labels = np.array([0, 0, 1, -100, 1, 1])
    values = np.eye(2)[[0, 0, 1, 1, 0, 1]]
    info = TargetInfo("token_classification", ["C", "H"])
    found = metrics_of(Predictions(rows, np.array([0, 1, 2, 3, 0, 1]), values, labels), info)
    assert found["accuracy"] == pytest.approx(4 / 5)
    assert found["accuracy_per_protein"] == pytest.approx((1 + 1 / 2) / 2)


def test_residues_with_several_targets() -> None:
    """Each target over its own labels, the mean of both, and the same in resampled proteins."""
    rows = np.repeat(np.arange(8), 5)
    labels = np.stack([RNG.integers(0, 2, 40), RNG.integers(0, 3, 40)], axis=1)
    labels[3:11, 0], labels[::4, 1] = -100, -100
    values = np.concatenate([RNG.dirichlet(np.ones(2), 40), RNG.dirichlet(np.ones(3), 40)], axis=1)
    info = TargetInfo("token_classification", list("CHabc"), columns=["u", "v"], widths=[2, 3])
    everything = Predictions(rows, np.tile(np.arange(5), 8), values, labels)
    found = metrics_of(everything, info)
    for number, (name, part) in enumerate((("u", values[:, :2]), ("v", values[:, 2:]))):
        known, predicted = labels[:, number], part.argmax(axis=1)
        there = known >= 0
        assert found[f"accuracy/{name}"] == sklearn.accuracy_score(known[there], predicted[there])
        assert found[f"mcc/{name}"] == pytest.approx(
            sklearn.matthews_corrcoef(known[there], predicted[there]), rel=1e-12
        )
        each = [(known == predicted)[there & (rows == row)] for row in range(8)]
        mean = np.mean([x.mean() for x in each if len(x)])
        assert found[f"accuracy_per_protein/{name}"] == pytest.approx(mean, rel=1e-15)
    for name in ("accuracy", "mcc", "auroc", "accuracy_per_protein"):
        assert found[name] == pytest.approx((found[f"{name}/u"] + found[f"{name}/v"]) / 2, rel=1e-15)
    assert bootstrap_intervals(everything, info, 20, seed=1).keys() == found.keys()
    numbers = RNG.normal(size=(40, 2))
    known = numbers + RNG.normal(size=(40, 2))
    known[5:10, 1] = np.nan
    info = TargetInfo("token_regression", ["u", "v"])
    found = metrics_of(Predictions(rows, None, numbers, known), info)
    there = ~np.isnan(known[:, 1])
    correlation = stats.spearmanr(known[there, 1], numbers[there, 1]).statistic
    assert found["spearman/v"] == pytest.approx(correlation, rel=1e-12)
    each = [stats.spearmanr(known[rows == r, 1], numbers[rows == r, 1]).statistic for r in range(8) if r != 1]
    assert found["spearman_per_protein/v"] == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_labels_of_a_class_that_training_never_saw_are_wrong(kind: str) -> None:
    """Even where they are predicted; all else is scikit-learn's, given what is predicted of the others."""
    labels = np.array([0, 1, 3, 3, -100, 1, 0, 3])
    values = RNG.dirichlet(np.ones(4), size=8)
    values[2] = [0.1, 0.2, 0.0, 0.7]  # right by chance
    values[6] = [0.3, 0.1, 0.1, 0.5]  # and wrong by it
    info = TargetInfo(kind, list("wxyz"), [5, 5, 5, 0], untrained=[3])
    found = Predictions(np.arange(8) // 4, np.arange(8) % 4, values, labels)
    there = labels >= 0
    predicted = values.argmax(axis=1)
    assert predicted[2] == predicted[6] == 3
    predicted[labels == 3] = values[labels == 3, :3].argmax(axis=1)
    metrics = metrics_of(found, info)
    assert metrics["accuracy"] == ((predicted == labels) & (labels != 3))[there].mean()
    for name, function in (
        ("balanced_accuracy", sklearn.balanced_accuracy_score),
        ("mcc", sklearn.matthews_corrcoef),
        ("f1_macro", lambda known, given: sklearn.f1_score(known, given, average="macro")),
    ):
        assert metrics[name] == pytest.approx(function(labels[there], predicted[there]), rel=1e-12)
    if kind == "token_classification":
        each = [(predicted == labels)[there & (np.arange(8) // 4 == row)].mean() for row in (0, 1)]
        assert metrics["accuracy_per_protein"] == pytest.approx(np.mean(each), rel=1e-15)
    assert unseen_labels(found, info) == {"z": 3}
    assert unseen_labels(found, replace(info, untrained=[])) == {}
    # A head that was trained on the class before may be right.
    assert metrics_of(found, replace(info, untrained=[]))["accuracy"] > metrics["accuracy"]


def test_unseen_classes_of_several_columns_and_of_flags() -> None:
    labels = np.array([[0, 2], [1, 2], [1, 0]])
    values = np.eye(5)[[0, 1, 1]] + np.eye(5)[[4, 4, 2]]
    info = TargetInfo("token_classification", list("CHabC"), columns=["u", "v"], widths=[2, 3], untrained=[4])
    found = Predictions(np.zeros(3, dtype=int), np.arange(3), values, labels)
    assert unseen_labels(found, info) == {"v/C": 2}
    metrics = metrics_of(found, info)
    assert (metrics["accuracy/u"], metrics["accuracy/v"]) == (1.0, 1 / 3)
    flags = Predictions(
        np.arange(3), None, np.array([[0.9, 0.9]] * 3), np.array([[1.0, 1.0], [1.0, 0.0], [0, 1]])
    )
    of_flags = TargetInfo("multilabel", ["a", "b"], untrained=[1])
    assert unseen_labels(flags, of_flags) == {"b": 2}
    # Two of three are right of a, none of b: the predicted flag is wrong where it is 1 and where it is 0.
    assert metrics_of(flags, of_flags)["accuracy"] == pytest.approx(2 / 6)


def test_multilabel() -> None:
    labels = np.array([[1.0, 0.0], [0.0, np.nan], [1.0, 1.0], [0.0, 0.0]])
    values = np.array([[0.9, 0.1], [0.6, 0.9], [0.8, 0.7], [0.2, 0.6]])
    found = metrics_of(Predictions(np.arange(4), None, values, labels), TargetInfo("multilabel", ["u", "v"]))
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 2))
    assert found["f1_macro"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["auroc"] == 1.0


def test_what_is_not_defined_is_nan() -> None:
    constant = Predictions(np.arange(3), None, np.ones((3, 1)), np.arange(3.0)[:, None])
    assert math.isnan(metrics_of(constant, TargetInfo("regression", ["a"]))["spearman"])


@pytest.mark.parametrize("kind", ["regression", "classification", "multilabel", "token_classification"])
def test_no_label_has_no_metric(kind: str) -> None:
    """NaN, which files hold as null; never a number."""
    info = TargetInfo(kind, ["a", "b"])
    labels = np.full((5, 2), np.nan) if kind in ("regression", "multilabel") else np.full((5, 1), -100)
    found = metrics_of(Predictions(np.arange(5), None, RNG.uniform(size=(5, 2)), labels), info)
    assert len(found) > 4 and all(math.isnan(value) for value in found.values())


def test_intervals_are_those_of_the_mean() -> None:
    """Of squared errors, whose mean has a known standard error; residues of a protein go together."""
    errors = RNG.normal(size=400)
    found = Predictions(np.arange(400), None, errors[:, None], np.zeros((400, 1)))
    low, high = bootstrap_intervals(found, TargetInfo("regression", ["a"]), 400, seed=1)["mse"]
    standard = (errors**2).std() / 20
    assert low == pytest.approx((errors**2).mean() - 1.96 * standard, abs=0.3 * standard)
    assert high == pytest.approx((errors**2).mean() + 1.96 * standard, abs=0.3 * standard)
    rows = np.repeat([0, 1], 200)
    alike = Predictions(rows, np.tile(np.arange(200), 2), np.eye(2)[rows], np.zeros(400, dtype=np.int64))
    interval = bootstrap_intervals(alike, TargetInfo("token_classification", ["C", "H"]), 200, seed=1)
    assert interval["accuracy"] == (0.0, 1.0)
