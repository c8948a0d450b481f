"""Makes the result of an evaluation on labelled proteins: metrics, intervals, and every prediction.

`evaluate --out` writes it, and a fine-tuning writes that of its test split into its directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esm2mega.config.best_metric import HEADLINES
from esm2mega.config.schema import Run
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.files import write_json
from esm2mega.finetune.bootstrap import bootstrap_intervals, percentiles, quick_headline
from esm2mega.finetune.evaluate import UNSEEN, Measured
from esm2mega.finetune.output import rows_of, shown_labels, shown_predictions
from esm2mega.report.decimals import four_decimals
from esm2mega.train.loop import defined

Intervals = dict[str, tuple[float, float]]
"""Holds the 95 % interval of each metric that has one."""


def result_of(
    measured: Measured, proteins: LabelledProteins, checkpoint: str, data: str, step: int, recipe: str
) -> dict[str, Any]:
    """Return loss, metrics and counts of an evaluation; a loss or metric that is not defined is None.

    Args:
        measured: What was measured.
        proteins: The proteins.
        checkpoint: Path of the checkpoint.
        data: The table as the reader knows it.
        step: Step of the checkpoint.
        recipe: Hash of the recipe of the loss.
    """
    result: dict[str, Any] = {
        "checkpoint": checkpoint,
        "data": data,
        "step": step,
        "loss": measured.loss,
        **measured.metrics,
        **({UNSEEN: measured.unseen} if measured.unseen else {}),
        "num_labels": measured.num_labels,
        "num_sequences": len(proteins),
        "eval_recipe": recipe,
    }
    return {name: defined(value) for name, value in result.items()}


def intervals_of(measured: Measured, info: TargetInfo, run: Run, of_all: bool) -> Intervals:
    """Compute the 95 % intervals of the metrics; the main process, which has the predictions, calls this.

    Args:
        measured: What was measured.
        info: Meaning of the predictions.
        run: The configuration, with `task.bootstrap` resamples; none without them.
        of_all: Whether those of all metrics are computed, which takes minutes for many residues or classes;
            if not, that of the metric of `HEADLINES` is, if it needs little time.
    """
    found = measured.predictions
    assert found is not None
    if found.labels is None or not run.task.bootstrap:
        return {}
    settings = (found, info, run.task.bootstrap, run.seed)
    if of_all:
        return bootstrap_intervals(*settings)
    drawn = quick_headline(*settings)
    interval = None if drawn is None else percentiles(drawn)
    return {} if interval is None else {HEADLINES[info.kind]: interval}


def write_result(
    path: Path,
    result: dict[str, Any],
    intervals: Intervals,
    measured: Measured,
    info: TargetInfo,
    proteins: LabelledProteins,
) -> None:
    """Write a result with the intervals and the prediction of every protein; one process calls this.

    Args:
        path: The file.
        result: From `result_of`.
        intervals: From `intervals_of`.
        measured: What was measured, with the predictions.
        info: Meaning of the predictions.
        proteins: The proteins.
    """
    found = measured.predictions
    assert found is not None
    examples = [
        {"id": proteins.id(row), "prediction": prediction, "label": label}
        for row, prediction, label in zip(
            rows_of(found),
            shown_predictions(found, info, proteins),
            shown_labels(found, info, proteins),
            strict=True,
        )
    ]
    write_json(path, {**result, "intervals": intervals, "notes": proteins.notes, "predictions": examples})


def interval_words(interval: tuple[float, float] | None) -> str:
    """Return the words for a 95 % interval; nothing where there is none."""
    if interval is None:
        return ""
    low, high = map(four_decimals, interval)
    return f"95 % interval {low} to {high}"
