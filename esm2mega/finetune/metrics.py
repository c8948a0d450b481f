"""Computes metrics by the definitions of SciPy and scikit-learn.

Every metric is computed from the gathered predictions of a whole split, never from means of micro-batches. A
label of a class that no training has had a label of counts as wrong, whatever is predicted.

Legend: ``n`` proteins or residues with a label, ``k`` outputs, ``m`` target columns, ``c`` classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.schema import IGNORED, Target, TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.contact_metrics import contact_counts, contact_metrics
from esm2mega.infer.correlation import spearman, varied

Array = npt.NDArray[Any]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Predictions:
    """Holds the predictions of a split, in the order of the table.

    Attributes:
        rows: Number of the protein of each prediction, int64 ``[n]``, ascending; repeated for its residues.
        numbers: Number of the residue in its protein, int64 ``[n]``; None for tasks of proteins. For contacts
            the number of the first residue of the piece that was predicted.
        values: Values in units of the labels, or probabilities, fp64 ``[n, k]``. For contacts ``[n]`` arrays
            of the logits of all pairs, see `esm2mega.pairs`.
        labels: Labels as in `LabelledProteins`, for contacts ``[n]`` arrays with one label per pair; None if
            there are no labels.
    """

    rows: Array
    numbers: Array | None
    values: Array
    labels: Array | None


def check_packages() -> None:
    """Raise `UserError` before any work is done if a package that metrics need is missing."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"metrics need {error.name}; install it with `pip install 'esm2mega[finetune]'`"
        ) from None


def metrics_of(found: Predictions, info: TargetInfo) -> Metrics:
    """Compute all metrics of a task; one that is not defined for these labels is NaN.

    Args:
        found: Predictions with labels.
        info: Kind of the task and names of its outputs.
    """
    assert found.labels is not None
    if info.per_pair:
        return contact_metrics(contact_counts(found.values, found.labels))
    if info.kind == "multilabel":
        return multilabel_metrics(found.labels, found.values, info.untrained)
    each = {
        target.name: _of_target(info.kind, found.rows, labels, found.values[:, target.outputs], target)
        for target, labels in zip(info.targets, _by_target(found.labels), strict=True)
    }
    return _of_targets(each)


def unseen_labels(found: Predictions, info: TargetInfo) -> dict[str, int]:
    """Count the labels of each class that no training has had a label of; classes without any are left out.

    Args:
        found: Predictions with labels.
        info: Kind of the task, names of its outputs, and which of them are untrained.
    """
    assert found.labels is not None
    if info.kind == "multilabel":
        counts = np.count_nonzero(found.labels[:, info.untrained] == 1.0, axis=0)
    else:
        counts = np.array(
            [
                np.count_nonzero(labels == number)
                for target, labels in zip(info.targets, _by_target(found.labels), strict=True)
                for number in target.untrained
            ]
        )
    names = [info.output_names[number] for number in info.untrained]
    return {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}


def right_of_proteins(found: Predictions, info: TargetInfo) -> tuple[Array, Array]:
    """Count the right predictions of each protein, and its labels, int64 ``[n]`` each.

    Args:
        found: Predictions of one target of classes, with labels.
        info: Kind of the task, names of its outputs, and which of them are untrained.
    """
    assert found.labels is not None
    (target,), (labels,) = info.targets, _by_target(found.labels)
    right = (labels != IGNORED) & (labels == _predicted(labels, found.values, target.untrained))
    first = np.unique(found.rows, return_index=True)[1]
    sums = [np.add.reduceat(flags.astype(np.int64), first) for flags in (right, labels != IGNORED)]
    return sums[0], sums[1]


def _by_target(labels: Array) -> Array:
    """Return the labels ``[n]`` of each target, given ``[n]`` or ``[n, m]``."""
    return labels.T if labels.ndim == 2 else labels[None]


def _of_target(kind: str, rows: Array, labels: Array, values: Array, target: Target) -> Metrics:
    """Compare labels ``[n]``, of which some may be missing, with predictions ``[n, 1]`` or ``[n, c]``."""
    there = ~np.isnan(labels) if kind in NUMERIC_KINDS else labels != IGNORED
    rows, labels, values = rows[there], labels[there], values[there]
    if kind in NUMERIC_KINDS:
        metrics = regression_metrics(labels, values[:, 0])
    else:
        metrics = classification_metrics(labels, values, target.untrained)
    if kind == "token_regression":
        metrics["spearman_per_protein"] = _mean(_per_protein(rows, labels, values[:, 0], spearman))
    if kind == "token_classification":
        each = _per_protein(rows, labels, _predicted(labels, values, target.untrained), _accuracy)
        metrics["accuracy_per_protein"] = _mean(each)
    return metrics


def _of_targets(each: Mapping[str, Metrics]) -> Metrics:
    """Average each metric over the targets, and add those of each target as ``name/target`` if several."""
    first, *others = each.values()
    if not others:
        return first
    metrics = {name: _mean([of[name] for of in each.values()]) for name in first}
    for target, of in each.items():
        metrics |= {f"{name}/{target}": value for name, value in of.items()}
    return metrics


def regression_metrics(labels: Array, values: Array) -> Metrics:
    """Compute the metrics of numbers, ``[n]`` labels and ``[n]`` predictions, none of them missing."""
    if not len(labels):
        return dict.fromkeys(("mse", "rmse", "mae", "r2", "spearman", "pearson"), math.nan)
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    mse = float(mean_squared_error(labels, values))
    return {
        "mse": mse,
        "rmse": math.sqrt(mse),
        "mae": float(mean_absolute_error(labels, values)),
        "r2": float(r2_score(labels, values)) if len(labels) > 1 else math.nan,
        "spearman": spearman(labels, values),
        "pearson": _pearson(labels, values),
    }


def classification_metrics(labels: Array, values: Array, untrained: Sequence[int] = ()) -> Metrics:
    """Compute the metrics of classes, int64 ``[n]``, from probabilities, ``[n, c]``.

    Labels of `untrained` classes count as wrong; the area under the curve of such a class is that of its own
    probabilities.
    """
    names = ("accuracy", "balanced_accuracy", "mcc", "f1_macro", "f1_micro", "auroc")
    if not len(labels):
        return dict.fromkeys(names, math.nan)
    from sklearn import metrics

    predicted = _predicted(labels, values, untrained)
    with warnings.catch_warnings():
        # scikit-learn warns of a class that is predicted and does not occur; it counts as never right.
        warnings.simplefilter("ignore")
        return {
            "accuracy": _accuracy(labels, predicted),
            "balanced_accuracy": float(metrics.balanced_accuracy_score(labels, predicted)),
            "mcc": float(metrics.matthews_corrcoef(labels, predicted)),
            "f1_macro": float(metrics.f1_score(labels, predicted, average="macro")),
            "f1_micro": float(metrics.f1_score(labels, predicted, average="micro")),
            "auroc": _mean([_auroc(labels == c, values[:, c]) for c in _scored(values)]),
        }


def multilabel_metrics(labels: Array, values: Array, untrained: Sequence[int] = ()) -> Metrics:
    """Compute the metrics of flags, float64 ``[n, k]`` with NaN for none, from probabilities, ``[n, k]``.

    Averages are over labels; accuracy is over known flags, exact_match over proteins with all flags known.
    Flags of `untrained` labels count as wrong where they are 1.
    """
    from sklearn.metrics import f1_score

    there, predicted = ~np.isnan(labels), values >= 0.5
    if not there.any():
        return dict.fromkeys(("accuracy", "exact_match", "f1_macro", "f1_micro", "auroc"), math.nan)
    predicted[:, untrained] &= labels[:, untrained] != 1.0
    whole = there.all(axis=1)
    each = [
        float(f1_score(labels[there[:, c], c], predicted[there[:, c], c], zero_division=0.0))
        for c in range(labels.shape[1])
        if there[:, c].any()
    ]
    right = predicted == (labels == 1.0)
    return {
        "accuracy": _mean(right[there].tolist()),
        "exact_match": _mean(right[whole].all(axis=1).tolist()),
        "f1_macro": _mean(each),
        "f1_micro": float(f1_score(labels[there], predicted[there], zero_division=0.0)),
        "auroc": _mean(
            [_auroc(labels[there[:, c], c] == 1.0, values[there[:, c], c]) for c in range(labels.shape[1])]
        ),
    }


def objects(arrays: Iterable[Array]) -> Array:
    """Put n arrays of any lengths into one array of objects, ``[n]``."""
    found = list(arrays)
    joined = np.empty(len(found), dtype=object)
    joined[:] = found
    return joined


def _per_protein(
    rows: Array, labels: Array, values: Array, measure: Callable[[Array, Array], float]
) -> list[float]:
    borders = np.flatnonzero(np.diff(rows)) + 1
    pairs = zip(np.split(labels, borders), np.split(values, borders), strict=True)
    return [measure(*pair) for pair in pairs if len(pair[0])]


def _predicted(labels: Array, values: Array, untrained: Sequence[int]) -> Array:
    """Return the likeliest class, ``[n]``; where the label is of an untrained one, the likeliest other."""
    predicted = values.argmax(axis=1)
    if len(unseen := np.flatnonzero(np.isin(labels, untrained))):
        trained = np.setdiff1d(np.arange(values.shape[1]), untrained)
        predicted[unseen] = trained[values[np.ix_(unseen, trained)].argmax(axis=1)]
    return predicted


def _accuracy(labels: Array, predicted: Array) -> float:
    return float((labels == predicted).mean())


def _pearson(labels: Array, values: Array) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(labels, values).statistic) if varied(labels, values) else math.nan


def _scored(values: Array) -> Sequence[int]:
    """Return the classes whose area is averaged; of two classes it is the second alone."""
    return [1] if values.shape[1] == 2 else range(values.shape[1])


def _auroc(positive: Array, scores: Array) -> float:
    """Return the area under the ROC curve of one class against the rest; NaN where one does not occur."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, scores)) if 0 < positive.sum() < len(positive) else math.nan


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    kept = [value for value in values if not math.isnan(value)]
    return float(np.mean(kept)) if kept else math.nan
