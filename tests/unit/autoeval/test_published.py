"""The table of published figures: every row is complete, and names what the package knows."""

from __future__ import annotations

import math

import numpy as np

from esm2mega.autoeval.published import published_figures, table
from esm2mega.config.best_metric import HEADLINES
from esm2mega.data.benchmarks.names import FLIP_TASKS, TAPE_TASKS
from esm2mega.finetune import contact_metrics
from esm2mega.finetune.metrics import classification_metrics, regression_metrics

RNG = np.random.default_rng(0)

FLIP = {
    f"flip/{task}:{split}": FLIP_TASKS[task].kind_of(split)
    for task in FLIP_TASKS
    for split in FLIP_TASKS[task].splits
}
TAPE = {f"tape/{name}:{split}": task.kind for name, task in TAPE_TASKS.items() for split in task.splits[2:]}
KINDS = {**FLIP, **TAPE, "proteingym": "regression"}

METRICS = {
    "regression": set(regression_metrics(RNG.normal(size=9), RNG.normal(size=9))),
    "classification": set(classification_metrics(np.array([0, 1]), np.eye(2))),
    "contact": {*contact_metrics.NAMES},
}
METRICS["token_classification"] = METRICS["classification"] | {"accuracy_per_protein"}


def test_every_row_is_complete() -> None:
    assert len(table()) > 100
    for row in table():
        assert None not in row and None not in row.values(), "a cell is missing or too many"
        assert row["metric"] in METRICS[KINDS[row["task"]]], row
        is_error = row["metric"] in ("mse", "rmse", "mae")
        assert 0 <= float(row["value"]) <= (math.inf if is_error else 1), row
        assert row["model"] and row["source"], row
        assert row["comparable"] in ("yes", "no"), row
        assert row["comparable"] == "yes" or row["caveat"], f"what is not comparable says why: {row}"
        assert all(cell == cell.strip() for cell in row.values()), row


def test_no_figure_stands_twice() -> None:
    keys = [(row["task"], row["metric"], row["model"], row["mode"], row["caveat"]) for row in table()]
    assert len(set(keys)) == len(keys)


def test_figures_of_a_task() -> None:
    """Comparable ones come first; another metric is never comparable, and says so."""
    found = published_figures("tape/stability:test", "spearman")
    assert {figure.model: figure.value for figure in found}["TAPE Transformer"] == 0.73
    assert all(figure.comparable for figure in found)
    others = published_figures("tape/stability:test", "mse")
    assert [figure.comparable for figure in others] == [False] * len(found)
    assert all(figure.caveat and figure.caveat.startswith("spearman, in place of mse") for figure in others)
    structure = published_figures("flip/secondary_structure:sampled", HEADLINES["token_classification"])
    assert [figure.comparable for figure in structure] == [True] * 6 + [False] * 2
    gb1 = published_figures("flip/gb1:two_vs_rest", "spearman")
    assert gb1 and not any(figure.comparable for figure in gb1)
    assert published_figures("flip/sav:mixed", "accuracy") == []


def test_leaderboard_of_proteingym() -> None:
    """The six sizes of ESM-2, as `tests/unit/infer/test_proteingym.py` computes them from the assays."""
    found = {figure.model: figure.value for figure in published_figures("proteingym", "spearman")}
    values = [found[f"ESM-2 {size}"] for size in ("8M", "35M", "150M", "650M", "3B", "15B")]
    assert values == [0.226, 0.321, 0.387, 0.414, 0.406, 0.4]
