"""Lists what evaluations measure, and whether less of it is better: the values of `checkpoint.best_metric`.

The names are those of the records in ``log.jsonl``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

from esm2mega.config.schema import CheckpointConfig, DownstreamConfig, TaskConfig
from esm2mega.errors import UserError

VALID_LOSS = "valid_loss"
"""Names the loss, which every evaluation measures."""

_PREFIX = "valid_"

_DOWNSTREAM = "downstream/"

_NUMBERS = ("mse", "rmse", "mae", "r2", "spearman", "pearson")
_CLASSES = ("accuracy", "balanced_accuracy", "mcc", "f1_macro", "f1_micro", "auroc")
_PRECISIONS = ("p_at_L", "p_at_L2", "p_at_L5")

_METRICS: dict[str | None, tuple[str, ...]] = {
    None: ("perplexity",),
    "regression": _NUMBERS,
    "token_regression": (*_NUMBERS, "spearman_per_protein"),
    "classification": _CLASSES,
    "token_classification": (*_CLASSES, "accuracy_per_protein"),
    "multilabel": ("accuracy", "exact_match", "f1_macro", "f1_micro", "auroc"),
    "contact": (
        *(f"{part}{name}" for part in ("", "short_", "medium_", "long_") for name in _PRECISIONS),
        *(f"{name}_pooled" for name in _PRECISIONS),
    ),
}
"""Maps each `task.kind`, None for pretraining, to what an evaluation measures besides the loss."""

HEADLINES = {
    "regression": "spearman",
    "token_regression": "spearman",
    "classification": "accuracy",
    "token_classification": "accuracy",
    "multilabel": "f1_micro",
    "contact": "p_at_L5",
}
"""Maps each kind of task to the metric that is shown during training."""

_OF_EACH_COLUMN = ("regression", "token_regression", "token_classification")
"""With several target columns these tasks measure every metric for each of them too, as ``name/column``."""

_LESS_IS_BETTER = ("loss", "perplexity", "mse", "rmse", "mae")


def metric_names(task: TaskConfig) -> list[str]:
    """Return the valid values of `checkpoint.best_metric` for a task."""
    metrics = [f"{_PREFIX}{name}" for name in _METRICS[task.kind]]
    columns = task.target_columns if task.kind in _OF_EACH_COLUMN and len(task.target_columns) > 1 else []
    return [VALID_LOSS, *metrics, *(f"{metric}/{column}" for column in columns for metric in metrics)]


def headline_of(measured: Collection[str]) -> str | None:
    """Return the metric that judges a task, given what an evaluation of it measured; None for pretraining.

    Args:
        measured: Names of metrics, without that of a split before them.
    """
    kinds = (kind for kind in HEADLINES if set(_METRICS[kind]) <= set(measured))
    return next((HEADLINES[kind] for kind in kinds), None)


def downstream_names(settings: DownstreamConfig) -> list[str]:
    """Return the names of the tasks that a pretraining is measured on: those of their folders."""
    return [Path(folder).name for folder in settings.tasks]


def downstream_metric(name: str) -> str:
    """Return what `checkpoint.best_metric` calls a task that a pretraining is measured on."""
    return f"{_DOWNSTREAM}{name}"


def is_downstream(metric: str) -> bool:
    """Tell whether a metric is that of a task that a pretraining is measured on."""
    return metric.startswith(_DOWNSTREAM)


def less_is_better(metric: str) -> bool:
    """Tell in which direction a metric improves."""
    return metric.removeprefix(_PREFIX).partition("/")[0] in _LESS_IS_BETTER


def check_best_metric(
    checkpoint: CheckpointConfig,
    task: TaskConfig,
    validates: bool,
    downstream: DownstreamConfig | None = None,
) -> None:
    """Refuse a `checkpoint.best_metric` that no evaluation of the run would measure.

    Args:
        checkpoint: Names the metric.
        task: The task, which decides what is measured.
        validates: Whether the run has validation data.
        downstream: Tasks that are measured besides; None for none.

    Raises:
        UserError: It is no metric of the task, or nothing is evaluated.
    """
    metric, valid = checkpoint.best_metric, metric_names(task)
    if downstream is not None:
        valid += map(downstream_metric, downstream_names(downstream))
    if metric not in valid:
        near = difflib.get_close_matches(metric, valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"checkpoint.best_metric={metric} is not one of {', '.join(valid)}{hint}")
    if metric != VALID_LOSS and not validates:
        raise UserError(
            f"checkpoint.best_metric={metric} needs validation data; set data.valid, or leave "
            "checkpoint.best_metric out"
        )
