"""Resamples the proteins of a split, for intervals of metrics and of their differences between models."""

from __future__ import annotations

import numpy as np

from esm2mega.config.best_metric import HEADLINES
from esm2mega.data.counter_rng import Purpose, derive_seed
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.contact_metrics import contact_counts, contact_metrics
from esm2mega.finetune.metrics import Array, Predictions, metrics_of, right_of_proteins
from esm2mega.infer.correlation import spearman

_INTERVAL = (2.5, 97.5)
"""Sets the percentiles of the resampled metrics that bound a 95 % interval."""


def bootstrap_intervals(
    found: Predictions, info: TargetInfo, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Compute 95 % intervals of the metrics by drawing proteins with replacement, as many as there are.

    Resamples in which a metric is not defined do not count for it.

    Args:
        found: Predictions with labels.
        info: Kind of the task and names of its outputs.
        resamples: Number of draws.
        seed: Seed of the run; the same seed draws the same proteins.

    Returns:
        The percentiles 2.5 and 97.5 of each metric.
    """
    drawn = bootstrap_metrics(found, info, resamples, seed)
    limits = {name: percentiles(values) for name, values in drawn.items()}
    return {name: interval for name, interval in limits.items() if interval is not None}


def bootstrap_headline(found: Predictions, info: TargetInfo, resamples: int, seed: int) -> Array:
    """Compute the metric of `HEADLINES` alone in resamples, ``[resamples]``, as `bootstrap_metrics` does."""
    drawn = quick_headline(found, info, resamples, seed)
    return bootstrap_metrics(found, info, resamples, seed)[HEADLINES[info.kind]] if drawn is None else drawn


def quick_headline(found: Predictions, info: TargetInfo, resamples: int, seed: int) -> Array | None:
    """Do what `bootstrap_headline` does, if that needs little time; return None otherwise.

    An accuracy and a micro-averaged F1 need only sums of each protein, so that nothing is computed anew for
    every resample; a rank correlation of proteins needs no other metric beside it.
    """
    headline = HEADLINES[info.kind]
    if info.kind == "regression" and len(info.targets) == 1:
        return _resampled_spearman(found, resamples, seed)
    if headline == "f1_micro":
        right, counts = _f1_of_proteins(found, info)
    elif headline == "accuracy" and len(info.targets) == 1:
        right, counts = right_of_proteins(found, info)
    else:
        return None
    rng = np.random.default_rng(derive_seed(seed, Purpose.BOOTSTRAP))
    drawn = [rng.integers(0, len(counts), len(counts)) for _ in range(resamples)]
    known = np.array([counts[chosen].sum() for chosen in drawn], np.float64)
    with np.errstate(invalid="ignore"):  # a draw of proteins without labels has no accuracy
        ratios = np.array([right[chosen].sum() for chosen in drawn]) / known
    if headline == "f1_micro" and found.labels is not None:
        flags: Array = np.any(~np.isnan(found.labels), axis=1)
        # Where flags are known, but none is 1 or predicted, it is 0.
        ratios[(known == 0) & np.array([flags[chosen].any() for chosen in drawn])] = 0.0
    return ratios


def _resampled_spearman(found: Predictions, resamples: int, seed: int) -> Array:
    """Correlate predictions of one number for each protein with the known labels, ``[resamples]``."""
    assert found.labels is not None
    order = np.unique(found.rows, return_index=True)[1]
    labels, values = found.labels.reshape(len(order))[order], found.values[order, 0]
    rng = np.random.default_rng(derive_seed(seed, Purpose.BOOTSTRAP))
    drawn = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(labels), len(labels))
        known = chosen[~np.isnan(labels[chosen])]
        drawn.append(spearman(labels[known], values[known]))
    return np.array(drawn)


def _f1_of_proteins(found: Predictions, info: TargetInfo) -> tuple[Array, Array]:
    """Return numerator and denominator of the F1 of each protein's known flags, ``[n]`` each."""
    labels = found.labels
    assert labels is not None
    predicted = (found.values >= 0.5) & ~np.isnan(labels)
    predicted[:, info.untrained] &= labels[:, info.untrained] != 1.0
    right = 2 * ((labels == 1.0) & predicted).sum(axis=1)
    return right, (labels == 1.0).sum(axis=1) + predicted.sum(axis=1)


def percentiles(values: Array) -> tuple[float, float] | None:
    """Return the bounds of the 95 % interval of resampled values, ``[resamples]``; NaN does not count."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return None
    low, high = np.percentile(kept, _INTERVAL).tolist()
    return low, high


def bootstrap_metrics(found: Predictions, info: TargetInfo, resamples: int, seed: int) -> dict[str, Array]:
    """Compute the metrics of resamples of the proteins, which are drawn with replacement.

    Residues of a protein are drawn together. Predictions of other models for the same proteins are resampled
    alike with the same `seed`.

    Args:
        found: As for `bootstrap_intervals`.
        info: As for `bootstrap_intervals`.
        resamples: As for `bootstrap_intervals`.
        seed: As for `bootstrap_intervals`.

    Returns:
        Each metric in each resample, ``[resamples]``; NaN where it is not defined.
    """
    assert found.labels is not None
    proteins, first, counts = np.unique(found.rows, return_index=True, return_counts=True)
    if info.per_pair:
        return bootstrap_contacts(contact_counts(found.values[first], found.labels[first]), resamples, seed)
    rng = np.random.default_rng(derive_seed(seed, Purpose.BOOTSTRAP))
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        chosen = rng.integers(0, len(proteins), len(proteins))
        indices = np.concatenate([np.arange(first[i], first[i] + counts[i]) for i in chosen])
        # Each copy of a protein counts as a protein of its own.
        rows = np.repeat(np.arange(len(chosen)), counts[chosen])
        metrics = metrics_of(Predictions(rows, None, found.values[indices], found.labels[indices]), info)
        for name, value in metrics.items():
            drawn.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in drawn.items()}


def bootstrap_contacts(counts: Array, resamples: int, seed: int) -> dict[str, Array]:
    """Compute the metrics of contacts in the resamples of `bootstrap_metrics`, ``[resamples]`` each.

    Args:
        counts: Counts of each protein, as `contact_counts` returns them, ``[n, m, 2]``.
        resamples: As for `bootstrap_metrics`.
        seed: As for `bootstrap_metrics`.
    """
    rng = np.random.default_rng(derive_seed(seed, Purpose.BOOTSTRAP))
    drawn = [contact_metrics(counts[rng.integers(0, len(counts), len(counts))]) for _ in range(resamples)]
    return {name: np.array([metrics[name] for metrics in drawn]) for name in contact_metrics(counts)}
