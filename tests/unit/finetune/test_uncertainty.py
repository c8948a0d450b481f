"""Means, spreads and intervals equal those of NumPy and SciPy, and intervals cover what they say."""

from __future__ import annotations

import numpy as np
import pytest

from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.uncertainty import Summary, conformal_factor, extra_widths, spread_factor

stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed: pip install esm2mega[finetune]")
RNG = np.random.default_rng(5)


def summary(info: TargetInfo, draws: np.ndarray) -> Summary:
    found = Summary(info)
    for values in draws:
        found.add(values)
    return found


def test_numbers_have_the_mean_and_standard_deviation_of_numpy() -> None:
    """Also where they are large and alike, of which squares have no digits left; NaN is a cropped residue."""
    info = TargetInfo("token_regression", ["u", "v"])
    draws = 1e9 + RNG.normal(size=(7, 5, 2))
    draws[:, 3] = np.nan
    found = summary(info, draws).arrays(np.array([2.0, 3.0]))
    assert {name: array.shape[1] for name, array in found.items()} == {"predictions": 2, **extra_widths(info)}
    mean, sd = draws.mean(axis=0), draws.std(axis=0, ddof=1)
    # A few units in the last place of 1e9.
    for name, expected in {
        "predictions": mean,
        "sd": sd,
        "low": mean - sd * [2, 3],
        "high": mean + sd * [2, 3],
    }.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-6)
    assert np.isnan(found["sd"][3]).all() and (found["sd"][:3] > 0.1).all()


@pytest.mark.parametrize("kind", ["classification", "multilabel", "token_classification"])
def test_probabilities_have_the_entropies_of_scipy(kind: str) -> None:
    """Of all classes of a target together, of each label that a protein may have or not alone."""
    columns = {"columns": ["x", "y"], "widths": [3, 2]} if kind == "token_classification" else {}
    info = TargetInfo(kind, list("abcde"), **columns)
    groups = [slice(0, 5)] if kind == "classification" else [slice(0, 3), slice(3, 5)]
    draws = np.concatenate([RNG.dirichlet(np.full(3, 0.3), (4, 6)), RNG.dirichlet([1, 1], (4, 6))], axis=2)
    if kind == "classification":
        draws /= 2
    draws[:, 0, :] = [1.0, 0.0, 0.0, 1.0, 0.0] if kind != "classification" else [1.0, 0.0, 0.0, 0.0, 0.0]
    found = summary(info, draws).arrays(np.zeros(0))
    mean = draws.mean(axis=0)
    np.testing.assert_allclose(found["predictions"], mean, rtol=0, atol=1e-15)

    def entropies(p: np.ndarray) -> np.ndarray:
        if kind == "multilabel":
            return np.stack([stats.entropy([p[:, i], 1 - p[:, i]], axis=0) for i in range(5)], axis=1)
        return np.stack([stats.entropy(p[:, group], axis=1) for group in groups], axis=1)

    expected = entropies(mean)
    mutual = expected - np.mean([entropies(p) for p in draws], axis=0)
    np.testing.assert_allclose(found["entropy"], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["mutual_information"], mutual, rtol=0, atol=1e-12)
    assert (found["mutual_information"][1:] > 0).all() and (found["mutual_information"] >= 0).all()
    assert {name: array.shape[1] for name, array in found.items()} == {"predictions": 5, **extra_widths(info)}


@pytest.mark.parametrize("count", [2, 5])
def test_an_interval_of_the_spread_holds_one_more_draw(count: int) -> None:
    draws = np.random.default_rng(count).normal(3, 2, size=(count + 1, 40_000))
    half = spread_factor(count) * draws[:-1].std(axis=0, ddof=1)
    covered = np.abs(draws[-1] - draws[:-1].mean(axis=0)) <= half
    # 95 % and four standard errors.
    assert abs(covered.mean() - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 40_000)


@pytest.mark.parametrize("n", [19, 45])
def test_a_calibrated_interval_covers_what_it_says(n: int) -> None:
    """Between 95 % and 1 / (n + 1) more, for noise that the spread knows of only in part."""
    rng, trials = np.random.default_rng(n), 4000
    sd = rng.uniform(0.5, 2.0, size=(trials, n + 1))
    labels = sd**0.5 * rng.standard_t(3, size=(trials, n + 1))
    labels[:, n // 2] += 5.0 * (rng.uniform(size=trials) < 0.1)
    order = rng.permuted(np.tile(np.arange(n + 1), (trials, 1)), axis=1)
    sd, labels = np.take_along_axis(sd, order, 1), np.take_along_axis(labels, order, 1)
    covered = []
    for spread, label in zip(sd[:, :, None], labels[:, :, None], strict=True):
        (factor,) = conformal_factor(np.zeros((n, 1)), spread[:n], label[:n], "t", ["y"])
        covered.append(abs(label[n, 0]) <= factor * spread[n, 0])
    rank = -(-95 * (n + 1) // 100)
    error = 4 * np.sqrt(0.95 * 0.05 / trials)
    # It is rank / (n + 1) for labels without ties.
    assert 0.95 <= rank / (n + 1) < 0.95 + 1 / (n + 1)
    assert abs(np.mean(covered) - rank / (n + 1)) < error


def test_a_factor_is_a_label_of_its_rank_and_leaves_missing_ones_out() -> None:
    labels = np.stack([np.arange(1.0, 41.0), np.full(40, np.nan)], axis=1)
    labels[:20, 1] = 3.0
    found = conformal_factor(np.zeros((40, 2)), np.full((40, 2), 2.0), labels, "t.csv", ["u", "v"])
    assert found == [39 / 2, 3 / 2]
    with pytest.raises(UserError, match=r"--calibrate t.csv: has 18 labels of v; .* needs 19 at least"):
        conformal_factor(np.zeros((18, 1)), np.ones((18, 1)), np.ones((18, 1)), "t.csv", ["v"])
    sd = np.ones((20, 1))
    sd[:2] = 0.0
    # A prediction that is the label is within every interval.
    assert conformal_factor(np.zeros((20, 1)), sd, np.where(sd, 1.0, 0.0), "t.csv", ["v"]) == [1.0]
    with pytest.raises(UserError, match="the predictions for 2 of 20 labels have no spread"):
        conformal_factor(np.zeros((20, 1)), sd, np.ones((20, 1)), "t.csv", ["v"])
