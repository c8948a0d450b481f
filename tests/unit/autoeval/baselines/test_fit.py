"""Baselines against scikit-learn by hand, and what they are for each kind of task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.naive_bayes import MultinomialNB

from esm2mega.autoeval.baselines import fit
from esm2mega.autoeval.baselines.features import k_mers
from esm2mega.autoeval.baselines.fit import Baseline, baselines_of
from esm2mega.autoeval.probe.heads import LOGISTIC_STRENGTHS, RIDGE_STRENGTHS, SMOOTHINGS
from esm2mega.autoeval.probe.labels import SPLITS, TEST, TRAIN, VALID, read_splits
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import LabelledProteins, proteins_of_pairs
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.baseline import PREFIX, baseline_metrics
from esm2mega.finetune.metrics import metrics_of
from tests.infer_models import LETTERS, random_proteins

GB1 = Path(__file__).parents[5] / "shared/data/flip/gb1"
SIZES = {TRAIN: 120, VALID: 40, TEST: 50}

Splits = dict[str, LabelledProteins]


def splits_of(pairs: list[Any], **task: Any) -> tuple[Splits, TargetInfo]:
    """Pairs of sequence and label as splits of `SIZES`."""
    config, first, info = TaskConfig(**task), 0, None
    splits = {}
    for name in SPLITS:
        part = pairs[first : first + SIZES[name]]
        splits[name], info = proteins_of_pairs(part, config, info, name)
        first += SIZES[name]
    assert info is not None
    return splits, info


def variants() -> list[tuple[str, float]]:
    """Variants of a protein with effects that add up, and noise."""
    rng = np.random.default_rng(3)
    wild, effects = list(random_proteins([40])[0]), rng.normal(size=(40, len(LETTERS)))
    pairs = []
    for _ in range(sum(SIZES.values())):
        letters, value = list(wild), float(rng.normal() * 0.1)
        for place in rng.choice([3, 9, 10, 22, 31], 3, replace=False):
            number = rng.integers(len(LETTERS))
            letters[place], value = LETTERS[number], value + effects[place, number]
        pairs.append(("".join(letters), float(value)))
    return pairs


def unaligned(count: int = sum(SIZES.values())) -> list[tuple[str, int]]:
    """Proteins of many lengths, of which the second third has more leucine and the last more tryptophan."""
    rng = np.random.default_rng(4)
    pairs = []
    for number in range(count):
        kind = number % 3
        letters = LETTERS + ("", "LLLLL", "WWWWW")[kind]
        pairs.append(("".join(rng.choice(list(letters), size=20 + number % 17)), kind))
    return pairs


def by_name(found: list[Baseline]) -> dict[str, Baseline]:
    return {baseline.name: baseline for baseline in found}


@pytest.mark.parametrize("source", ["made up", "sampled", "two_vs_rest"])
def test_one_hot_ridge_is_that_of_scikit_learn(source: str) -> None:
    """A dense column for every residue at every position, and every penalty in turn."""
    if source == "made up":
        splits, info = splits_of(variants(), kind="regression")
    elif not GB1.is_dir():
        pytest.skip("FLIP's files are not beside the repository (../shared/data/flip)")
    else:
        task = TaskConfig(kind="regression", target_columns=["TARGET"])
        splits, info = read_splits(GB1 / f"{source}.fasta", task, DataConfig(), None)
    tokens = {name: split.tokens.reshape(len(split), -1) for name, split in splits.items()}
    everything = np.concatenate(list(tokens.values()))
    # Where all proteins of all splits are alike, columns would say nothing but that there is an intercept.
    places = np.flatnonzero((everything != everything[0]).any(axis=0))
    x = {name: np.eye(33)[each[:, places]].reshape(len(each), -1) for name, each in tokens.items()}
    y = {name: split.labels[:, 0] for name, split in splits.items() if split.labels is not None}
    tried = [Ridge(alpha, solver="svd").fit(x[TRAIN], y[TRAIN]) for alpha in RIDGE_STRENGTHS]
    losses = [np.mean((each.predict(x[VALID]) - y[VALID]) ** 2) for each in tried]
    best = int(np.argmin(losses))
    mean, ridge = baselines_of(splits, info, 1)
    assert (mean.name, ridge.name) == ("mean", "one-hot ridge")
    np.testing.assert_allclose(mean.predictions.values, y[TRAIN].mean(), atol=1e-12)
    assert ridge.note == f"alpha={RIDGE_STRENGTHS[best]:g}"
    # Labels are of the order of 1; the iterations end at a residual of 1e-8 of theirs.
    expected = tried[best].predict(x[TEST])
    np.testing.assert_allclose(ridge.predictions.values[:, 0], expected, atol=1e-5)
    assert metrics_of(ridge.predictions, info)["spearman"] > 0.5
    assert ridge.predictions.labels is splits[TEST].labels


def test_k_mers_of_unaligned_proteins_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logistic regression, and naive Bayes where there are many classes."""
    splits, info = splits_of(
        [(sequence, "abc"[kind]) for sequence, kind in unaligned()], kind="classification"
    )
    x = {name: k_mers(split).astype(np.float64) for name, split in splits.items()}
    y = {name: split.labels for name, split in splits.items()}

    def by_hand(tried: list[Any]) -> tuple[int, Any]:
        losses = [log_loss(y[VALID], each.predict_proba(x[VALID])) for each in tried]
        best = int(np.argmin(losses))
        return best, tried[best].predict_proba(x[TEST])

    tried: list[Any] = [
        LogisticRegression(C=c, max_iter=5000).fit(x[TRAIN], y[TRAIN]) for c in LOGISTIC_STRENGTHS
    ]
    best, expected = by_hand(tried)
    majority, found = baselines_of(splits, info, 1)
    assert (majority.name, found.name) == ("majority", "k-mers logistic")
    assert found.note == f"C={LOGISTIC_STRENGTHS[best]:g}"
    # Both stop where the gradient is below 1e-4, from different starts, with a weak penalty.
    np.testing.assert_allclose(found.predictions.values, expected, atol=2e-2)
    score = metrics_of(found.predictions, info)["accuracy"]
    assert score > 0.8 > 0.5 > metrics_of(majority.predictions, info)["accuracy"]

    monkeypatch.setattr(fit, "MANY_CLASSES", 2)
    tried = [MultinomialNB(alpha=alpha).fit(x[TRAIN], y[TRAIN]) for alpha in SMOOTHINGS]
    best, expected = by_hand(tried)
    _, found = baselines_of(splits, info, 1)
    assert (found.name, found.note) == ("k-mers naive Bayes", f"smoothing={SMOOTHINGS[best]:g}")
    # Features are fp32, and sums of logarithms of 34 residues are of the order of 100.
    np.testing.assert_allclose(found.predictions.values, expected, atol=1e-4)


def flags() -> list[tuple[str, list[Any]]]:
    return [(sequence, [float(kind == 1), None if n % 7 == 0 else float(kind == 2), 0.0])
            for n, (sequence, kind) in enumerate(unaligned())]  # fmt: skip


def test_flags_have_a_model_each() -> None:
    """Also where some are not known, or alike in all proteins."""
    pairs = flags()
    splits, info = splits_of(pairs, kind="multilabel", target_columns=["u", "v", "w"])
    majority, found = baselines_of(splits, info, 1)
    assert (majority.name, found.name) == ("majority", "k-mers logistic")
    assert found.predictions.values.shape == majority.predictions.values.shape == (SIZES[TEST], 3)
    metrics, least = (metrics_of(each.predictions, info) for each in (found, majority))
    assert metrics["accuracy"] > 0.85 > least["accuracy"]
    assert (found.predictions.values[:, 2] == 0).all()


def test_several_numbers_of_which_some_are_missing() -> None:
    pairs = [
        (sequence, [float(kind), None if n % 5 == 0 else -3.0 * kind])
        for n, (sequence, kind) in enumerate(unaligned())
    ]
    splits, info = splits_of(pairs, kind="regression", target_columns=["u", "v"])
    mean, ridge = baselines_of(splits, info, 1)
    assert ridge.name == "k-mers ridge" and ridge.predictions.values.shape == (SIZES[TEST], 2)
    assert metrics_of(ridge.predictions, info)["r2"] > 0.2 > metrics_of(mean.predictions, info)["r2"]


def residues(kind: str) -> tuple[Splits, TargetInfo]:
    """The label of a residue follows from the second next one; the last two of a protein have none."""
    pairs = []
    for sequence, _ in unaligned():
        numbers = [LETTERS.index(letter) for letter in sequence[2:]] + [None, None]
        label: list[Any] = [None if n is None else n / 10 for n in numbers]
        if kind == "token_classification":
            label = [None if n is None else "CEH"[n % 3] for n in numbers]
        pairs.append((sequence, label))
    return splits_of(pairs, kind=kind)


@pytest.mark.parametrize("kind", ["token_classification", "token_regression"])
def test_windows_see_the_neighbours_of_a_residue(kind: str) -> None:
    splits, info = residues(kind)
    constant, found = baselines_of(splits, info, 1)
    is_class = kind == "token_classification"
    assert constant.name == ("majority" if is_class else "mean")
    assert found.name == f"one-hot window {'logistic' if is_class else 'ridge'}"
    metrics = metrics_of(found.predictions, info)
    assert metrics["accuracy" if is_class else "r2"] > 0.99
    assert metrics["accuracy_per_protein" if is_class else "spearman_per_protein"] > 0.95
    lengths = splits[TEST].lengths
    assert found.predictions.rows.tolist() == np.repeat(np.arange(len(lengths)), lengths).tolist()
    assert found.predictions.numbers is not None
    assert found.predictions.numbers.tolist() == [n for length in lengths for n in range(length)]


def contacts() -> tuple[Splits, TargetInfo]:
    rng = np.random.default_rng(6)
    pairs = []
    for sequence, _ in unaligned():
        steps = np.cumsum(rng.normal(size=(len(sequence), 3)) * 2.2, axis=0)
        pairs.append((sequence, [None if n % 9 == 4 else row for n, row in enumerate(steps.tolist())]))
    return splits_of(pairs, kind="contact")


@pytest.mark.parametrize("kind", ["regression", "classification", "multilabel", "token", "contact"])
def test_the_first_baseline_is_that_of_evaluate(kind: str) -> None:
    """`evaluate` prints it as ``baseline_NAME``, without what is not defined for it."""
    made = {
        "regression": lambda: splits_of([(a, float(b)) for a, b in unaligned()], kind="regression"),
        "classification": lambda: splits_of([(a, "abc"[b]) for a, b in unaligned()], kind="classification"),
        "multilabel": lambda: splits_of(flags(), kind="multilabel", target_columns=["u", "v", "w"]),
        "token": lambda: residues("token_classification"),
        "contact": contacts,
    }
    splits, info = made[kind]()
    first = baselines_of(splits, info, 1)[0]
    expected = baseline_metrics(first.predictions, info)
    found = metrics_of(first.predictions, info)
    assert expected and len(first.predictions.rows) == len(first.predictions.values)
    for name, value in expected.items():
        # Frequencies of contacts are fp32 here; those that it makes equal could not be told apart anyway.
        assert found[name.removeprefix(PREFIX)] == pytest.approx(value, abs=1e-12), name


def test_contacts_are_ranked_by_separation() -> None:
    splits, info = contacts()
    (found,) = baselines_of(splits, info, 1)
    assert found.name == "frequency by separation"
    metrics = metrics_of(found.predictions, info)
    # Nearby residues of a random walk are in contact more often than others.
    everything = np.concatenate(list(found.predictions.labels))  # type: ignore[arg-type]
    assert metrics["p_at_L5"] > 1.3 * everything[everything >= 0].mean() > 0.1


@pytest.mark.parametrize("per_residue", [False, True])
def test_a_large_training_split_is_cut_down_by_the_seed(
    monkeypatch: pytest.MonkeyPatch, per_residue: bool
) -> None:
    if per_residue:
        splits, info = residues("token_classification")
        monkeypatch.setattr(fit, "MOST_WINDOWS", 500)
    else:
        splits, info = splits_of([(a, float(b)) for a, b in unaligned()], kind="regression")
        monkeypatch.setattr(fit, "MOST_RESIDUES", 1000)
        monkeypatch.setattr(fit, "_RESIDUES_AT_ONCE", 100)
    found = [baselines_of(splits, info, seed)[1] for seed in (1, 1, 2)]
    note = found[0].note
    assert note is not None
    assert ("fitted to 500 of" in note) if per_residue else ("of 120 proteins" in note)
    values = [each.predictions.values for each in found]
    assert np.array_equal(values[0], values[1]) and not np.array_equal(values[0], values[2])
    score, least = (
        metrics_of(each.predictions, info) for each in (found[0], baselines_of(splits, info, 1)[0])
    )
    name = "accuracy" if per_residue else "mse"
    assert (score[name] > least[name]) if per_residue else (score[name] < least[name])


def test_labels_that_are_all_alike() -> None:
    splits, info = splits_of([(sequence, "a") for sequence, _ in unaligned()], kind="classification")
    majority, found = baselines_of(splits, info, 1)
    assert np.array_equal(found.predictions.values, majority.predictions.values)
    assert found.note == "no penalty, as the labels are all alike"
