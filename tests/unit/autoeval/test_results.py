"""Rows of results: values that are not defined, and what an earlier start left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from esm2mega.autoeval import suite
from esm2mega.autoeval.eval_model import EvalModel
from esm2mega.autoeval.prediction_table import spread_cells
from esm2mega.autoeval.results import Measured
from esm2mega.autoeval.suite import SuiteRequest
from esm2mega.autoeval.tasks import parse_tasks
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.metrics import Predictions


def test_what_is_not_defined_is_null() -> None:
    draws = np.full((2, 5), math.nan)
    row = Measured("m", "probe", [0.5, math.nan], draws, {"spearman": None}, None, []).row()
    assert row["value"] is row["low"] is row["seeds"]["sd"] is row["seeds"]["mean"] is None
    assert row["seeds"]["values"] == [0.5, None]
    json.dumps(row, allow_nan=False)


def test_a_kill_while_the_request_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EvalModel("m", "runs/m", "runs/m/step_4", "abc", 10, 4)
    monkeypatch.setattr(suite, "open_models", lambda checkpoints, with_contact_head: [model])
    request = SuiteRequest(["runs/m"], parse_tasks(["quick"], "flip"), ["probe"], "flip", str(tmp_path), {})
    (tmp_path / ".request.json.host.1.partial").write_text('{"req')
    assert suite._begin(request, tmp_path) == [model]
    assert suite._begin(request, tmp_path) == [model]
    with pytest.raises(UserError, match="another request: seeds was 1 and is 2; choose another --out"):
        suite._begin(SuiteRequest(**{**vars(request), "seeds": 2}), tmp_path)
    (tmp_path / "request.json").rename(tmp_path / "notes.json")
    with pytest.raises(UserError, match=r"holds other files, and no request.json"):
        suite._begin(request, tmp_path)


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
