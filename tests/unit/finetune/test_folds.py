"""Cross-validation: every protein is predicted once, by the model that has not seen it."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.finetune.folds import _described, _spread, folds_of
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(2)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(4, 40, 14)]
FOLDS = 3


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def settings(folder: Path) -> list[str]:
    return [
        *SETTINGS,
        *("task.kind=regression", "task.bootstrap=0", "train.max_steps=2", "train.eval_every=1"),
        *(f"run_dir={folder / 'run'}", f"data.train={folder / 't.csv'}"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    lines = [f"p{number},{sequence},{number / 4}" for number, sequence in enumerate(SEQUENCES)]
    (folder / "t.csv").write_text("\n".join(["id,sequence,target", *lines]) + "\n")
    assert main(["finetune", "--folds", str(FOLDS), *settings(folder)]) == 0
    return folder


def test_every_protein_is_predicted_once_by_a_model_that_has_not_seen_it(folder: Path) -> None:
    found = rows(folder / "run" / "folds.csv")
    assert sorted(row["id"] for row in found) == sorted(f"p{number}" for number in range(14))
    labels = {f"p{number}": number / 4 for number in range(14)}
    assert all(float(row["label"]) == labels[row["id"]] for row in found)
    for number in range(1, FOLDS + 1):
        parts = {
            split: {row["id"] for row in rows(folder / "run" / f"fold_{number}" / "splits" / f"{split}.csv")}
            for split in ("train", "valid", "test")
        }
        assert parts["test"] == {row["id"] for row in found if row["fold"] == str(number)}
        assert sum(map(len, parts.values())) == 14 and len(parts["train"] | parts["valid"]) == 14 - len(
            parts["test"]
        )
        following = {row["id"] for row in found if row["fold"] == str(number % FOLDS + 1)}
        assert parts["valid"] == following


def test_the_predictions_are_those_of_predict(folder: Path, tmp_path: Path) -> None:
    model = folder / "run" / "fold_2"
    out = tmp_path / "p.csv"
    assert main(["predict", str(model), str(folder / "t.csv"), "--out", str(out)]) == 0
    predicted = {row["id"]: float(row["target"]) for row in rows(out)}
    for row in rows(folder / "run" / "folds.csv"):
        if row["fold"] == "2":
            # Prediction files hold fp32.
            assert float(row["prediction"]) == pytest.approx(predicted[row["id"]], abs=1e-6)


def test_mean_and_spread_are_those_of_the_folds(folder: Path) -> None:
    summary = json.loads((folder / "run" / "folds.json").read_text())
    tests = [json.loads((folder / "run" / f"fold_{n}" / "test.json").read_text()) for n in (1, 2, 3)]
    assert summary["folds"] == 3 and {"loss", "rmse", "mae"} <= summary["metrics"].keys()
    assert not {"step", "num_sequences"} & summary["metrics"].keys()
    for name, found in summary["metrics"].items():
        values = [test[name] for test in tests]
        assert found["values"] == values
        assert found["mean"] == pytest.approx(statistics.mean(values), rel=1e-12, abs=1e-12)
        assert found["std"] == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-12)


def test_another_start_takes_finished_folds_as_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["folds.csv", "folds.json", "fold_1/test.json"]
    before = [(folder / "run" / name).read_bytes() for name in files]
    # Somebody has evaluated other proteins into the file of a fold.
    result = folder / "run" / "fold_1" / "test.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "loss": 77.0, "predictions": []}))
    assert main(["finetune", "--folds", str(FOLDS), *settings(folder)]) == 0
    assert [(folder / "run" / name).read_bytes() for name in files] == before
    printed = capsys.readouterr().out
    assert "over 3 folds" in printed and "out-of-fold predictions: " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds", "3", "data.split=0.8/0.2"], "--folds 3 splits data.train itself; set data.split=null"),
        (["--folds", "3", "data.valid=x.csv"], "cuts data.train into all splits, and data.valid=x.csv"),
        (["--folds", "20"], "no protein is left for part 15 (train), since the 14"),
        (["data.split=fold:4/3"], "data.split=fold:4/3 must be one of 3 or more folds"),
        (["data.split=fold:1/2"], "data.split=fold:1/2 must be one of 3 or more folds"),
        (["data.split=fold:x/3"], "data.split=fold:x/3 must be one of 3 or more folds"),
    ],
)
def test_what_is_refused(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text for text in settings(folder) if not text.startswith("run_dir")]
    assert main(["finetune", *given, f"run_dir={tmp_path / 'run'}", *words]) == 2
    assert message in capsys.readouterr().err


def test_all_folds_are_read_before_the_first_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class of one protein is missing where that protein is tested, or chooses the checkpoint."""
    lines = [f"p{number},{sequence},{'ab'[number % 2]}" for number, sequence in enumerate(SEQUENCES)]
    lines[5] = f"p5,{SEQUENCES[5]},rare"
    (tmp_path / "t.csv").write_text("\n".join(["id,sequence,target", *lines]) + "\n")
    given = [text for text in settings(tmp_path) if not text.startswith("task.kind")]
    assert main(["finetune", "--folds", str(FOLDS), *given, "task.kind=classification"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("esm2mega: error: fold ") and "'rare'" in said
    assert not (tmp_path / "run").exists()


def test_a_metric_that_a_fold_does_not_define_is_that_of_the_others() -> None:
    results = [{"spearman": 0.5, "step": 2}, {"spearman": None, "step": 2}, {"spearman": 0.7, "step": 2}]
    found = _spread(results)
    assert found["spearman"]["values"] == [0.5, None, 0.7]
    assert found["spearman"]["mean"] == pytest.approx(0.6)
    assert _described(found["spearman"]) == "0.6 +- 0.14 over 2 of 3 folds; not defined in fold 2"
    assert _described(_spread(results[:2])["spearman"]) == "0.5 over 1 of 2 folds; not defined in fold 2"
    assert _spread([{"spearman": None}] * 3) == {}


def test_the_folds_are_drawn_with_their_predictions(folder: Path) -> None:
    assert main(["plot", str(folder / "run")]) == 0
    page = (folder / "run" / "report.html").read_text()
    assert all(f"fold_{number}" in page for number in range(1, FOLDS + 1))
    assert "Predicted against measured" in page and "rmse" in page


def test_the_folds_are_an_ensemble(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "whole.csv"
    assert folds_of(str(folder / "run")) == [str(folder / "run" / f"fold_{n}") for n in range(1, FOLDS + 1)]
    assert main(["predict", str(folder / "run"), str(folder / "t.csv"), "--out", str(out)]) == 0
    assert f"mean and sd over {FOLDS} checkpoints" in capsys.readouterr().out
    assert list(rows(out)[0]) == [
        *("id", "truncated", "target", "target_sd", "target_low", "target_high"),
    ]


def test_intervals_are_not_calibrated_on_proteins_of_the_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every protein of the table was trained on by some fold; others are taken."""
    words = [
        "predict",
        str(folder / "run"),
        str(folder / "t.csv"),
        "--out",
        str(tmp_path / "x.csv"),
        "--calibrate",
    ]
    assert main([*words, str(folder / "t.csv")]) == 2
    said = capsys.readouterr().err
    assert "of its 14 proteins are in " in said and "fold_1/splits/train.csv, on which the model was" in said
    lines = [f"{('MKVW' * 8)[: 5 + number]},{number / 8}" for number in range(24)]
    (tmp_path / "other.csv").write_text("\n".join(["sequence,target", *lines]) + "\n")
    assert main([*words, str(tmp_path / "other.csv")]) == 0
    assert "calibrated on 24 proteins of" in capsys.readouterr().out
    (tmp_path / "odd.csv").write_text("sequence,target\nMKV,high\n")
    assert main([*words, str(tmp_path / "odd.csv")]) == 2
    assert "odd.csv:2: 'high' in column 'target' is not a number" in capsys.readouterr().err
