"""Fits the heads of a probe to fixed vectors, and chooses their strength by the validation split.

A head has one estimator for each target: ridge or logistic regression or an MLP of scikit-learn, or for
residues a convolution. The vectors are shifted and scaled by the training split; sparse ones, which are flags
and frequencies, are taken as they are. Of several strengths, or epochs, the one with the smallest loss on the
validation split is kept: mean squared error of numbers, cross-entropy of classes.

Legend: ``n`` proteins or residues with a label, ``h`` hidden size, ``c`` classes of a target.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LINEAR, MLP, CNN = "linear", "mlp", "cnn"

NAIVE_BAYES = "naive-bayes"
"""Names the head of baselines with so many classes that logistic regression would take hours."""

RIDGE_STRENGTHS = tuple(10.0**power for power in range(-3, 6))
"""Penalties of ridge regression, ``alpha`` of scikit-learn, for vectors of variance 1."""

LOGISTIC_STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""Inverse penalties of logistic regression, ``C`` of scikit-learn."""

MLP_WIDTH, MLP_EPOCHS, PATIENCE = 256, 200, 10
"""As the MLP of `esm2mega finetune`; it stops after as many epochs without a smaller validation loss."""

SPARSE_PATIENCE = 2
"""Penalties of sparse vectors are tried from the strongest on, until so many do not lessen the loss."""

SMOOTHINGS = tuple(10.0**power for power in range(-4, 2))
"""Pseudo-counts of naive Bayes, ``alpha`` of scikit-learn."""

_SPARSE_TOLERANCE = 1e-8
"""Bounds the relative residual of ridge regression on sparse vectors, which is solved by iterations."""

_TINY = 1e-12


class Head(Protocol):
    """Predicts one target: numbers as ``[n, 1]``, classes as probabilities ``[n, c]``, fp64."""

    def predict(self, vectors: Any) -> Array: ...


@dataclass(frozen=True)
class Examples:
    """Holds vectors, fp32 ``[n, h]``, and their labels, float64 or int64 ``[n]``; none is missing.

    The vectors are an array, or a sparse matrix of SciPy in rows.
    """

    vectors: Any
    labels: Array


def fit_head(
    name: str, train: Examples, valid: Examples, num_classes: int | None, seed: int
) -> tuple[Head, dict[str, float]]:
    """Fit a head to one target.

    Args:
        name: `LINEAR`, `MLP`, or for classes of sparse vectors `NAIVE_BAYES`.
        train: What it is fitted to.
        valid: What its strength, or the number of epochs, is chosen by.
        num_classes: Number of classes; None for numbers.
        seed: Seed of what is drawn.

    Returns:
        The head, and what was chosen.
    """
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.preprocessing import StandardScaler

    is_sparse = not isinstance(train.vectors, np.ndarray)
    scale = _unchanged if is_sparse else StandardScaler().fit(train.vectors).transform
    scaled = Examples(scale(train.vectors), train.labels)
    candidates = _sparse_linear if name == LINEAR and is_sparse else _CANDIDATES[name]
    patience = PATIENCE if name == MLP else SPARSE_PATIENCE if is_sparse else np.inf
    # What the labels are on average, where there is nothing to fit.
    constant = DummyRegressor() if num_classes is None else DummyClassifier(strategy="prior")
    head = _Fitted(constant.fit(scaled.vectors, scaled.labels), scale, num_classes)
    chosen, smallest, since = {}, np.inf, 0
    with warnings.catch_warnings():
        # An MLP that is trained epoch by epoch is warned about after each; so is a strength that needs more
        # iterations, which the validation loss judges as it judges the others.
        warnings.simplefilter("ignore")
        if num_classes is None or len(np.unique(train.labels)) > 1:
            for settings, estimator in candidates(scaled, num_classes is not None, seed):
                found = _Fitted(estimator, scale, num_classes)
                loss = _loss(found.predict(valid.vectors), valid.labels, num_classes)
                since += 1
                if loss < smallest:
                    head, chosen, smallest, since = copy.deepcopy(found), settings, loss, 0
                if since >= patience:
                    break
    return head, {**chosen, "valid_loss": float(smallest)} if chosen else {}


def _linear(train: Examples, is_class: bool, seed: int) -> Iterator[tuple[dict[str, float], Any]]:
    from sklearn.linear_model import Ridge

    if is_class:
        yield from _logistic(train)
        return
    for strength in RIDGE_STRENGTHS:
        yield {"alpha": strength}, Ridge(strength).fit(train.vectors.astype(np.float64), train.labels)


def _sparse_linear(train: Examples, is_class: bool, seed: int) -> Iterator[tuple[dict[str, float], Any]]:
    """Yield the estimators of `_linear` for sparse vectors, from the strongest penalty on."""
    from sklearn.linear_model import Ridge

    if is_class:
        yield from _logistic(train)
        return
    for strength in reversed(RIDGE_STRENGTHS):
        estimator = Ridge(strength, solver="sparse_cg", tol=_SPARSE_TOLERANCE)
        yield {"alpha": strength}, estimator.fit(train.vectors.astype(np.float64), train.labels)


def _logistic(train: Examples) -> Iterator[tuple[dict[str, float], Any]]:
    """Yield one estimator again and again, from the strongest penalty on.

    Each strength begins where the one before it ended, which saves three quarters of the iterations.
    """
    from sklearn.linear_model import LogisticRegression

    estimator = LogisticRegression(max_iter=1000, warm_start=True)
    vectors = train.vectors.astype(np.float64)
    for strength in LOGISTIC_STRENGTHS:
        yield {"C": strength}, estimator.set_params(C=strength).fit(vectors, train.labels)


def _naive_bayes(train: Examples, is_class: bool, seed: int) -> Iterator[tuple[dict[str, float], Any]]:
    from sklearn.naive_bayes import MultinomialNB

    for smoothing in reversed(SMOOTHINGS):
        yield {"smoothing": smoothing}, MultinomialNB(alpha=smoothing).fit(train.vectors, train.labels)


def _mlp(train: Examples, is_class: bool, seed: int) -> Iterator[tuple[dict[str, float], Any]]:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    kind = MLPClassifier if is_class else MLPRegressor
    labels, undo = train.labels, (0.0, 1.0)
    if not is_class:  # numbers of any unit
        undo = float(labels.mean()), float(labels.std()) or 1.0
        labels = (labels - undo[0]) / undo[1]
    # A generator, unlike a number, draws another order in every epoch. Its seed has 32 bits.
    draw, size = np.random.RandomState(seed % (1 << 32)), min(256, len(labels))
    estimator = kind(hidden_layer_sizes=(MLP_WIDTH,), batch_size=size, random_state=draw)
    classes = {"classes": np.unique(labels)} if is_class else {}
    for epoch in range(1, MLP_EPOCHS + 1):
        estimator.partial_fit(train.vectors, labels, **classes)
        yield {"epochs": epoch}, estimator if is_class else _Unscaled(estimator, *undo)


_CANDIDATES = {LINEAR: _linear, MLP: _mlp, NAIVE_BAYES: _naive_bayes}


def _unchanged(vectors: Any) -> Any:
    return vectors


@dataclass(frozen=True)
class _Unscaled:
    """Predicts in the unit of the labels with an estimator that was fitted to scaled ones."""

    estimator: Any
    mean: float
    std: float

    def predict(self, vectors: Array) -> Array:
        return self.estimator.predict(vectors) * self.std + self.mean


@dataclass(frozen=True)
class _Fitted:
    estimator: Any
    scale: Callable[[Any], Any]
    num_classes: int | None

    def predict(self, vectors: Any) -> Array:
        scaled = self.scale(vectors)
        if self.num_classes is None:
            return np.asarray(self.estimator.predict(scaled), np.float64).reshape(-1, 1)
        # A class without a training label is none of the estimator's.
        found = np.zeros((vectors.shape[0], self.num_classes))
        found[:, self.estimator.classes_] = self.estimator.predict_proba(scaled)
        return found


def _loss(values: Array, labels: Array, num_classes: int | None) -> float:
    """Return the mean squared error of numbers, or the cross-entropy of classes."""
    if num_classes is None:
        return float(np.mean((values[:, 0] - labels) ** 2))
    picked = values[np.arange(len(labels)), labels.astype(np.int64)]
    return float(-np.log(np.maximum(picked, _TINY)).mean())
