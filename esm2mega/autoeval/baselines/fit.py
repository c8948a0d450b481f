"""Fits the baselines of a task to its training split, and predicts the test split.

- ``mean``, ``majority``, ``frequency by separation``: what the training labels are on average.
- ``one-hot``: the residue at each position, where all proteins have one length, as variants of a protein do.
- ``k-mers``: how often pieces of 1, 2 and 3 residues occur, where lengths differ.
- ``one-hot window``: the residues around each residue, for labels of residues.

Ridge regression predicts numbers and logistic regression classes; the penalty is chosen by the validation
split as that of a probe is. The result depends on the seed only where a part of the training split is used.
Products with sparse matrices run in one thread; those of BLAS, which scikit-learn adds, may differ in the
last digits with the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.autoeval.baselines.features import HALF_WINDOW, OneHot, k_mers, windows
from esm2mega.autoeval.probe.heads import LINEAR, NAIVE_BAYES
from esm2mega.autoeval.probe.labels import TEST, TRAIN, VALID
from esm2mega.autoeval.probe.targets import fit_targets, label_columns, predict_targets
from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.counter_rng import Purpose, derive_seed
from esm2mega.data.labels.contacts import pair_labels
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.finetune.baseline import by_separation
from esm2mega.finetune.metrics import Predictions, objects

Array = npt.NDArray[Any]

MOST_RESIDUES = 10_000_000
"""Bounds the residues of the proteins of a split that are fitted to: their k-mers take less than 2 GB."""

MOST_WINDOWS = 200_000
"""Bounds the labelled residues of a split that windows are fitted to; 242 weights for each class follow."""

MANY_CLASSES = 100
"""Above so many classes k-mers are fitted by naive Bayes, since logistic regression would take hours."""

_RESIDUES_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Baseline:
    """Holds the predictions of one baseline.

    Attributes:
        name: Its name.
        predictions: Predictions of the test split, with its labels.
        note: What the reader has to know; None for nothing.
    """

    name: str
    predictions: Predictions
    note: str | None


def baselines_of(splits: Mapping[str, LabelledProteins], info: TargetInfo, seed: int) -> list[Baseline]:
    """Fit every baseline that is defined for a task, the simplest first, and predict the test split.

    Args:
        splits: Proteins with labels for training, validation and test, as `read_splits` returns them.
        info: Meaning of the labels.
        seed: Seed of what is left out where the training split is too large.

    Raises:
        UserError: A column of labels has none in training or validation.
    """
    if info.per_pair:
        return [_contacts(splits, info)]
    name = "mean" if info.kind in NUMERIC_KINDS else "majority"
    num_rows = int(splits[TEST].offsets[-1]) if info.per_residue else len(splits[TEST])
    constant = np.tile(np.array(info.baseline, np.float64), (num_rows, 1))
    baselines = [Baseline(name, _predictions(splits[TEST], constant, info), None)]
    return [*baselines, (_of_residues if info.per_residue else _of_proteins)(splits, info, seed)]


def _contacts(splits: Mapping[str, LabelledProteins], info: TargetInfo) -> Baseline:
    """Predict contacts by their frequency at each distance in training; without any, the nearest first."""
    test = splits[TEST]
    assert test.labels is not None
    if TRAIN in splits:
        name, known = "frequency by separation", np.array(info.baseline)
    else:
        name, known = "nearest along the chain", np.linspace(1.0, 0.0, int(test.lengths.max()))
    coordinates = np.split(test.labels, test.offsets[1:-1])
    values = objects(by_separation(known, length).astype(np.float32) for length in test.lengths.tolist())
    labels = objects(pair_labels(each, IGNORED) for each in coordinates)
    found = Predictions(np.arange(len(test)), np.zeros(len(test), np.int64), values, labels)
    return Baseline(name, found, None)


def _of_proteins(splits: Mapping[str, LabelledProteins], info: TargetInfo, seed: int) -> Baseline:
    parts = {name: _within(splits[name], seed) for name in (TRAIN, VALID)}
    lengths = np.concatenate([split.lengths for split in splits.values()])
    is_aligned = bool((lengths == lengths[0]).all())
    features: Callable[[LabelledProteins], Any] = OneHot(parts[TRAIN]) if is_aligned else k_mers
    has_many = info.kind == "classification" and info.num_outputs > MANY_CLASSES
    head = NAIVE_BAYES if has_many else LINEAR
    data = {name: (features(part), label_columns(part.labels)) for name, part in parts.items()}
    heads, chosen = fit_targets(head, info, seed, data, {name: split.path for name, split in splits.items()})
    test = splits[TEST]
    values = [predict_targets(info, heads, features(test.select(rows))) for rows in _pieces(test)]
    fitted = "naive Bayes" if has_many else _linear_name(info)
    note = _note(chosen, len(parts[TRAIN]), len(splits[TRAIN]), "proteins")
    name = f"{'one-hot' if is_aligned else 'k-mers'} {fitted}"
    return Baseline(name, _predictions(test, np.concatenate(values), info), note)


def _of_residues(splits: Mapping[str, LabelledProteins], info: TargetInfo, seed: int) -> Baseline:
    data = {}
    for name in (TRAIN, VALID):
        split = splits[name]
        assert split.labels is not None
        rows = _chosen(np.flatnonzero(~split.is_missing.all(axis=1)), MOST_WINDOWS, seed)
        data[name] = (windows(split, rows), split.labels[rows])
    paths = {name: split.path for name, split in splits.items()}
    heads, chosen = fit_targets(LINEAR, info, seed, data, paths)
    test, num_labelled = splits[TEST], int((~splits[TRAIN].is_missing.all(axis=1)).sum())
    rows = np.arange(int(test.offsets[-1]))
    pieces = np.array_split(rows, max(1, len(rows) // MOST_WINDOWS))
    values = np.concatenate([predict_targets(info, heads, windows(test, piece)) for piece in pieces])
    note = _note(chosen, data[TRAIN][0].shape[0], num_labelled, "labelled residues")
    name = f"one-hot window {_linear_name(info)}"
    return Baseline(name, _predictions(test, values, info), f"{2 * HALF_WINDOW + 1} residues; {note}")


def _linear_name(info: TargetInfo) -> str:
    return "ridge" if info.kind in NUMERIC_KINDS else "logistic"


def _note(chosen: list[dict[str, float]], used: int, available: int, what: str) -> str:
    """Say which penalties were chosen, and of how much of the training split."""
    strengths = [f"{key}={value:g}" for each in chosen for key, value in each.items() if key != "valid_loss"]
    some = ", ".join(dict.fromkeys(strengths)) or "no penalty, as the labels are all alike"
    part = "" if used == available else f"; fitted to {used:,} of {available:,} {what}"
    return f"{some}{part}"


def _predictions(test: LabelledProteins, values: Array, info: TargetInfo) -> Predictions:
    """Return values of proteins, or of all of their residues, as predictions."""
    if not info.per_residue:
        return Predictions(np.arange(len(test)), None, values, test.labels)
    numbers = np.arange(len(values)) - np.repeat(test.starts, test.lengths)
    return Predictions(np.repeat(np.arange(len(test)), test.lengths), numbers, values, test.labels)


def _within(proteins: LabelledProteins, seed: int) -> LabelledProteins:
    """Return the proteins, or some that the seed chooses if together they are too long."""
    if int(proteins.offsets[-1]) <= MOST_RESIDUES:
        return proteins
    order = np.random.default_rng(derive_seed(seed, Purpose.SPLIT)).permutation(len(proteins))
    fits = np.cumsum(proteins.lengths[order]) <= MOST_RESIDUES
    return proteins.select(np.sort(order[fits]))


def _chosen(rows: Array, most: int, seed: int) -> Array:
    """Return the rows, or some that the seed chooses if there are too many."""
    if len(rows) <= most:
        return rows
    rng = np.random.default_rng(derive_seed(seed, Purpose.SPLIT))
    return np.sort(rng.choice(rows, most, replace=False))


def _pieces(proteins: LabelledProteins) -> Iterator[Array]:
    """Yield the numbers of the proteins in pieces that bound memory."""
    piece = proteins.starts // _RESIDUES_AT_ONCE
    yield from np.split(np.arange(len(proteins)), np.flatnonzero(np.diff(piece)) + 1)
