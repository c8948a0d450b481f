"""Rows of results: values that are not defined, and how far heads differ."""

from __future__ import annotations

import json
import math

import numpy as np

from esm2mega.autoeval.prediction_table import spread_cells
from esm2mega.autoeval.results import Measured
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.metrics import Predictions


def test_what_is_not_defined_is_null() -> None:
    draws = np.full((2, 5), math.nan)
    row = Measured("m", "probe", [0.5, math.nan], draws, {"spearman": None}, None, []).row()
    assert row["value"] is row["low"] is row["seeds"]["sd"] is row["seeds"]["mean"] is None
    assert row["seeds"]["values"] == [0.5, None]
    json.dumps(row, allow_nan=False)


def test_how_far_heads_of_several_seeds_differ() -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(size=(3, 5, 2))
    info = TargetInfo("regression", ["a", "b"])
    heads = [Predictions(np.arange(5), None, each, None) for each in values]
    cells = spread_cells(heads, info)
    assert list(cells[0]) == ["a_sd", "a_low", "a_high", "b_sd", "b_low", "b_high"]
    found = np.array([[float(each) for each in row.values()] for row in cells]).reshape(5, 2, 3)
    sd, mean = values.std(axis=0, ddof=1), values.mean(axis=0)
    # Student's t with 2 degrees of freedom has its 97.5 % quantile at 4.302653.
    half = 4.302653 * np.sqrt(4 / 3) * sd
    np.testing.assert_allclose(found, np.stack([sd, mean - half, mean + half], axis=-1), rtol=1e-6)
    assert spread_cells(heads[:1], info) == [] and spread_cells(heads[:1] * 3, info) == [], (
        "they are the same"
    )
    assert spread_cells(heads, TargetInfo("multilabel", ["a", "b"])) == []
