"""The page of a cross-validation: its metrics, its curves, and predictions against labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.report.fold_dirs import fold_dirs
from esm2mega.report.folds import plot_folds
from esm2mega.report.log import JsonlLog


def example(name: str, prediction: object, label: object) -> dict[str, object]:
    return {"id": name, "prediction": prediction, "label": label}


def make(folder: Path, kind: str, tests: list[list[object]], metrics: dict[str, object]) -> Path:
    """Write a cross-validation of two folds with the predictions of their tests."""
    for number, examples in enumerate(tests, 1):
        run = folder / f"fold_{number}"
        with JsonlLog(run / "log.jsonl") as log:
            log.write({"kind": "train", "step": 2, "loss": 1.0 + number, "lr": 1e-3})
            log.write({"kind": "eval", "step": 2, "valid_loss": 0.5 * number, "eval_recipe": "ab"})
        (run / "config.yaml").write_text(f"task:\n  kind: {kind}\ndata:\n  split: fold:{number}/2\n")
        result = {"data": "t.csv", "step": 2, "loss": 1.0, "intervals": {}, "predictions": examples}
        (run / "test.json").write_text(json.dumps(result))
    (folder / "folds.json").write_text(json.dumps({"folds": 2, "metrics": metrics}))
    return folder


def spread(*values: float | None) -> dict[str, object]:
    known = [value for value in values if value is not None]
    return {"mean": sum(known) / len(known), "std": None if len(known) < 2 else 0.25, "values": values}


def test_numbers_are_drawn_against_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = [[example("a", 0.5, 0.75)], [example("b", 1.5, 1.25), example("c", 2.5, None)]]
    metrics = {"spearman": spread(0.5, None), "mse": spread(1e-19, 3e-19)}
    folder = make(tmp_path / "run", "regression", tests, metrics)
    assert main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "report.png"), str(folder / "report.html")]
    page = (folder / "report.html").read_text()
    # The mean is that of the folds that define it; the other cell is empty.
    assert "<td>0.5000</td><td></td><td>0.5000</td><td></td>" in page
    assert "<td>2e-19</td><td>0.2500</td><td>1e-19</td><td>3e-19</td>" in page
    assert "Predicted against measured" in page and page.count("<circle") >= 2
    assert "Keys that differ" in page and "fold:1/2" in page
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kind", "tests", "picture"),
    [
        ("classification", [[example("a", "in", "in")], [example("b", "in", "out")]], "known"),
        ("token_classification", [[example("a", "HHE", "HEE")], [example("b", "EE", "E-")]], "known"),
        ("token_regression", [[example("a", [0.5, None], [1.5, 2.0])], []], "Predicted against measured"),
        (
            "regression",
            [[example("a", {"x": 1.0, "y": 2.0}, {"x": 1.5, "y": 2.5})], []],
            "Predicted against measured of x",
        ),
        # Names of classes with blanks cannot be told apart.
        ("token_classification", [[example("a", "signal peptide other", "other other")], []], None),
        ("multilabel", [[example("a", ["in"], ["out"])], []], None),
        ("contact", [[example("a", [[0, 9, 0.5]], [[0, 9]])], []], None),
    ],
)
def test_each_kind_has_the_pictures_that_its_file_allows(
    tmp_path: Path, kind: str, tests: list[list[object]], picture: str | None
) -> None:
    folder = make(tmp_path / "run", kind, tests, {"loss": spread(1.0, 2.0)})
    plot_folds(folder)
    page = (folder / "report.html").read_text()
    assert ("Predictions of proteins that were not trained on" in page) == (picture is not None)
    assert picture is None or picture in page


def test_what_is_no_cross_validation_and_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fold_dirs(tmp_path) == []
    folder = make(tmp_path / "run", "regression", [[], []], {})
    assert fold_dirs(folder) == [folder / "fold_1", folder / "fold_2"]
    plot_folds(folder)
    assert "No metric is defined." in (folder / "report.html").read_text()
    assert main(["plot", str(folder), "--results", "r"]) == 2
    assert "--results r is for the page of one run; name one of the folds" in capsys.readouterr().err
    result = folder / "fold_2" / "test.json"
    for damage in ("", "[]", '{"step": 2}', json.dumps({**json.loads(result.read_text()), "intervals": 1})):
        result.write_text(damage)
        with pytest.raises(UserError, match=r"fold_2/test.json: is damaged; remove it, and run"):
            plot_folds(folder)
    result.unlink()
    make(folder, "regression", [[example("a", 0.25, 0.5)]], {})
    plot_folds(folder)
    assert "Of 1 of 2 folds: the others have no test.json." in (folder / "report.html").read_text()
    make(folder, "regression", [[example("a", "high", 0.5)], []], {})
    with pytest.raises(UserError, match=r"fold_1/test.json: is damaged; remove it, and run"):
        plot_folds(folder)
    odd_metrics = ('{"folds": 2, "metrics": {"a": 1}}', '{"folds": 2, "metrics": {"a": {"mean": "x"}}}')
    for damage in (
        *odd_metrics,
        "",
        "[]",
        '{"folds": 2}',
        '{"folds": "x", "metrics": {}}',
        '{"folds": 0, "metrics": {}}',
    ):
        (folder / "folds.json").write_text(damage)
        with pytest.raises(UserError, match=r"folds.json: is damaged; run `esm2mega finetune --folds` again"):
            fold_dirs(folder)
