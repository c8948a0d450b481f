"""Lists what evaluations measure, and whether less of it is better: the values of `checkpoint.best_metric`.

The names are those of the records in ``log.jsonl``.
"""

from __future__ import annotations

import difflib

from esm2mega.config.schema import CheckpointConfig, TaskConfig
from esm2mega.errors import UserError

VALID_LOSS = "valid_loss"
"""Names the loss, which every evaluation measures."""

_PREFIX = "valid_"

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

_OF_EACH_COLUMN = ("regression", "token_regression", "token_classification")
"""With several target columns these tasks measure every metric for each of them too, as ``name/column``."""

_LESS_IS_BETTER = ("loss", "perplexity", "mse", "rmse", "mae")


def metric_names(task: TaskConfig) -> list[str]:
    """Return the valid values of `checkpoint.best_metric` for a task."""
    metrics = [f"{_PREFIX}{name}" for name in _METRICS[task.kind]]
    columns = task.target_columns if task.kind in _OF_EACH_COLUMN and len(task.target_columns) > 1 else []
    return [VALID_LOSS, *metrics, *(f"{metric}/{column}" for column in columns for metric in metrics)]


def less_is_better(metric: str) -> bool:
    """Tell in which direction a metric improves."""
    return metric.removeprefix(_PREFIX).partition("/")[0] in _LESS_IS_BETTER


def check_best_metric(checkpoint: CheckpointConfig, task: TaskConfig, validates: bool) -> None:
    """Refuse a `checkpoint.best_metric` that no evaluation of the run would measure.

    Args:
        checkpoint: Names the metric.
        task: The task, which decides what is measured.
        validates: Whether the run has validation data.

    Raises:
        UserError: It is no metric of the task, or nothing is evaluated.
    """
    metric, valid = checkpoint.best_metric, metric_names(task)
    if metric not in valid:
        near = difflib.get_close_matches(metric, valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"checkpoint.best_metric={metric} is not one of {', '.join(valid)}{hint}")
    if metric != VALID_LOSS and not validates:
        raise UserError(
            f"checkpoint.best_metric={metric} needs validation data; set data.valid, or leave "
            "checkpoint.best_metric out"
        )
