"""Which metrics may decide what is best: those that evaluations compute, in their direction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from esm2mega.config.best_metric import check_best_metric, less_is_better, metric_names
from esm2mega.config.schema import TASK_KINDS, CheckpointConfig, TaskConfig
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.metrics import Metrics, Predictions, metrics_of, objects
from esm2mega.pairs import num_pairs
from esm2mega.train.evaluate import evaluation_record

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

ROWS = np.repeat(np.arange(10), 6)
COLUMNS = ["a", "b"]


def _computed(kind: str, columns: list[str], right: bool, rng: np.random.Generator) -> Metrics:
    """The metrics of predictions that are right, or have nothing to do with the labels."""
    shape = (len(ROWS), len(columns))
    info: dict[str, Any] = {"names": columns}
    if kind == "contact":
        labels = [rng.integers(0, 2, num_pairs(80)).astype(np.int8) for _ in range(10)]
        wrong = [rng.permutation(x) for x in labels]
        values = [np.where(x == 1, 3.0, -3.0) for x in (labels if right else wrong)]
        found = Predictions(np.arange(10), np.zeros(10, int), objects(values), objects(labels))
        return metrics_of(found, TargetInfo(kind, ["contact"]))
    if kind in ("regression", "token_regression"):
        labels = rng.normal(size=shape)
        values = labels + 0.01 if right else rng.normal(size=shape)
    elif kind == "multilabel":
        labels = rng.integers(0, 2, (len(ROWS), 2)).astype(float)
        values = np.abs((labels if right else rng.integers(0, 2, labels.shape)) - 0.1)
        info = {"names": ["u", "v"]}
    else:
        labels = rng.integers(0, 3, shape)
        predicted = labels if right else rng.integers(0, 3, shape)
        values = np.concatenate([np.eye(3)[predicted[:, n]] * 0.7 + 0.1 for n in range(shape[1])], axis=1)
        several = {"columns": columns, "widths": [3] * len(columns)} if kind.startswith("token") else {}
        info = {"names": list("xyz") * len(columns), **several}
        labels = labels if several else labels[:, 0]
    return metrics_of(Predictions(ROWS, np.tile(np.arange(6), 10), values, labels), TargetInfo(kind, **info))


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_the_metrics_of_a_task_are_those_that_are_computed(kind: str) -> None:
    """For one target column, and where a task may have them for several."""
    rng = np.random.default_rng(2)
    one_column = kind in ("classification", "contact")
    for columns in [["target"]] if one_column else [["target"], COLUMNS]:
        names = metric_names(TaskConfig(kind=kind, target_columns=columns))
        good, bad = (_computed(kind, columns, right, rng) for right in (True, False))
        assert sorted(names) == sorted(["valid_loss", *(f"valid_{name}" for name in good)])
        for name in good:
            assert (good[name] < bad[name]) == less_is_better(f"valid_{name}"), name
            assert good[name] != bad[name], name


def test_so_are_those_of_pretraining() -> None:
    record = evaluation_record({"loss": 2.0, "unigram_loss": 2.9}, "abc")
    assert metric_names(TaskConfig()) == [name for name in record if name.startswith("valid_")]
    assert all(map(less_is_better, metric_names(TaskConfig())))


def test_others_are_refused_with_the_valid_ones() -> None:
    task = TaskConfig(kind="regression")
    check_best_metric(CheckpointConfig(best_metric="valid_spearman"), task, validates=True)
    with pytest.raises(UserError) as error:
        check_best_metric(CheckpointConfig(best_metric="spearman"), task, validates=True)
    assert str(error.value) == (
        "checkpoint.best_metric=spearman is not one of valid_loss, valid_mse, valid_rmse, valid_mae, "
        "valid_r2, valid_spearman, valid_pearson; did you mean valid_spearman?"
    )
    with pytest.raises(UserError, match="best_metric=valid_accuracy is not one of valid_loss, valid_perplex"):
        check_best_metric(CheckpointConfig(best_metric="valid_accuracy"), TaskConfig(), validates=True)
    with pytest.raises(UserError, match="best_metric=valid_r2 needs validation data; set data.valid"):
        check_best_metric(CheckpointConfig(best_metric="valid_r2"), task, validates=False)
    check_best_metric(CheckpointConfig(), task, validates=False)
