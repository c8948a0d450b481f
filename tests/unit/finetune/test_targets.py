"""Residues with two columns of labels, end to end: trained, evaluated, predicted, reloaded, refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.convert.heads.hf_classifiers import TOKEN, architecture_of, shapes_of
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.data.labels.dataset import proteins_of_sequences
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.errors import UserError
from esm2mega.finetune.api import TrainedModel, infer_model, train_model
from esm2mega.finetune.metrics import Predictions
from esm2mega.finetune.output import shown_labels
from esm2mega.finetune.prediction_files import PredictionContents, check_kind, write_csv
from esm2mega.infer.arrays import ArrayFile, plain_offsets
from tests.infer_models import write_fasta
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(8)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(4, 60, 40)]
THREE = ["".join("HEC"[ord(c) % 3] for c in text) for text in SEQUENCES]
LARGE = [" ".join("yes" if c in "FYWHKRM" else "no" for c in text) for text in SEQUENCES]
MASKS = ["".join(RNG.choice(list("01"), len(text))) for text in SEQUENCES]
COLUMNS = ("task.target_columns=[three,large]", "task.mask_column=[seen,null]")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    rows = list(zip(map(str, range(40)), SEQUENCES, THREE, LARGE, MASKS, strict=True))
    for name, part in (("train", rows[:30]), ("valid", rows[30:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "sequence", "three", "large", "seen"), *part])
    return folder


def train(tables: Path, run_dir: Path, *overrides: str) -> TrainedModel:
    data = (f"data.train={tables / 'train.csv'}", f"data.valid={tables / 'valid.csv'}")
    task = ("task.kind=token_classification", "task.head=cnn", "train.eval_every=2", "optim.lr=1e-2")
    return train_model([*SETTINGS, f"run_dir={run_dir}", *data, *task, *COLUMNS, *overrides])


@pytest.fixture(scope="module")
def trained(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return train(tables, tmp_path_factory.mktemp("run"), "train.max_steps=30")


def right(row: int, three: str, large: str) -> tuple[list[bool], list[bool]]:
    """Of a protein's residues that count."""
    first = [a == b for a, b, m in zip(three, THREE[row], MASKS[row], strict=True) if m == "1"]
    return first, [a == b for a, b in zip(large.split(), LARGE[row].split(), strict=True)]


@pytest.mark.slow
def test_metrics_of_training_follow_from_what_is_predicted(
    tables: Path, trained: TrainedModel, tmp_path: Path
) -> None:
    for ending in ("csv", "h5"):
        out = tmp_path / f"out.{ending}"
        assert main(["predict", str(trained.checkpoint), str(tables / "valid.csv"), "--out", str(out)]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert list(rows[0]) == ["id", "truncated", "three", "large"]
    pairs = [right(int(row["id"]), row["three"], row["large"]) for row in rows]
    for number, name in enumerate(("three", "large")):
        pooled = np.mean([x for pair in pairs for x in pair[number]])
        assert trained.metrics[f"valid_accuracy/{name}"] == pooled > 0.5
    mean = (trained.metrics["valid_accuracy/three"] + trained.metrics["valid_accuracy/large"]) / 2
    assert trained.metrics["valid_accuracy"] == pytest.approx(mean, rel=1e-15)
    shown = [{"three": row["three"], "large": row["large"]} for row in rows]
    assert infer_model(trained.checkpoint, SEQUENCES[30:]) == shown

    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "out.h5") as file:
        assert (list(file.attrs["columns"]), list(file.attrs["widths"])) == (["three", "large"], [3, 2])
        assert list(file.attrs["names"]) == ["three/C", "three/E", "three/H", "large/no", "large/yes"]
        values = file["predictions"][: file["offsets"][1]]
    assert np.abs(values[:, :3].sum(axis=1) - 1).max() < 1e-12
    assert "".join("CEH"[i] for i in values[:, :3].argmax(axis=1)) == rows[0]["three"]

    result = tmp_path / "metrics.json"
    arguments = ["evaluate", str(trained.checkpoint), "--data", str(tables / "valid.csv"), "--out"]
    assert main([*arguments, str(result), "task.bootstrap=20"]) == 0
    found = json.loads(result.read_text())
    assert found["loss"] == trained.metrics["valid_loss"]
    assert found["accuracy/large"] == trained.metrics["valid_accuracy/large"]
    assert found["num_labels"] == sum(mask.count("1") + len(mask) for mask in MASKS[30:])
    assert {"accuracy/three", "accuracy", "mcc/large"} <= found["intervals"].keys()
    assert [example["prediction"] for example in found["predictions"]] == shown
    hidden = "".join(a if m == "1" else "-" for a, m in zip(THREE[30], MASKS[30], strict=True))
    assert found["predictions"][0]["label"] == {"three": hidden, "large": LARGE[30]}


def test_the_head_goes_on_and_keeps_its_columns(
    tables: Path, trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = (
        f"init_from={trained.checkpoint}",
        "finetune.load_head=true",
        "train.max_steps=2",
        "optim.lr=1e-30",
    )
    again = train(tables, tmp_path / "warm", *warm)
    before, after = (layout.read_state(x)["task"] for x in (trained.checkpoint, again.checkpoint))
    assert before == after and (after["columns"], after["widths"]) == (["three", "large"], [3, 2])
    assert again.metrics["valid_loss"] == pytest.approx(trained.metrics["valid_loss"], rel=1e-12)
    # A run that resumes compares its targets with those that it began with.
    resumed = train(tables, tmp_path / "warm", *warm, "train.max_steps=3")
    assert layout.read_state(resumed.checkpoint)["task"] == before
    assert main(["inspect", str(trained.checkpoint)]) == 0
    counts = " ".join(LARGE[:30]).split().count("yes")
    assert f"\noutput 4 large/yes, {counts} training labels\n" in capsys.readouterr().out
    for columns, masks, message in (
        ("large,three", "null,seen", r"have another order; set task.target_columns=\[three,large\]"),
        ("three", "seen", "the loaded head has 2 targets, three, large; name a column for each"),
    ):
        changes = (f"task.target_columns=[{columns}]", f"task.mask_column=[{masks}]")
        with pytest.raises(UserError, match=message):
            train(tables, tmp_path / "other", *warm, *changes)
        # Labels of one target are never compared with predictions of another.
        refused = ["evaluate", str(trained.checkpoint), "--data", str(tables / "valid.csv"), *changes]
        assert main(refused) == 2
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(UserError, match="the loaded head has 2 targets"):
        infer_model(trained.checkpoint, ["MK"], ["task.target_columns=[three]", "task.mask_column=null"])


def test_transformers_has_no_such_head(trained: TrainedModel, tmp_path: Path) -> None:
    assert main(["convert", str(trained.checkpoint), str(tmp_path / "hf"), "--to", "hf", "--drop-head"]) == 0
    saved = TargetInfo.from_dict(layout.read_state(trained.checkpoint)["task"])
    shapes = shapes_of(TOKEN, 24, 5)
    for info in (saved, TargetInfo("token_regression", ["u", "v"], std=[1.0, 1.0])):
        task = TaskConfig(kind=info.kind, head="linear", target_columns=["three", "large"])
        with pytest.raises(UserError, match="no equivalent of a head for 2 columns .*; --drop-head"):
            architecture_of(HeadDescription(task, info, shapes))
    one = TargetInfo("token_classification", ["C", "H"])
    task = TaskConfig(kind="token_classification", head="linear")
    assert architecture_of(HeadDescription(task, one, shapes)) == TOKEN


def test_numbers_of_several_columns_in_a_table(tmp_path: Path) -> None:
    """A cropped protein, and labels that are missing in one column."""
    info = TargetInfo("token_regression", ["u", "v"], std=[1.0, 1.0])
    values = np.array([[0.5, 1.0], [-2.0, 3.0], [4.0, 5.0]])
    labels = np.array([[1.0, np.nan], [np.nan, 2.0], [0.25, 8.0]])
    proteins = proteins_of_sequences(["MKT", "L"])
    found = Predictions(np.array([0, 0, 1]), np.array([1, 2, 0]), values, labels)
    prepare_fasta([write_fasta(tmp_path / "x.fasta", [("0", "MKT"), ("1", "L")])], tmp_path / "store")
    spec = BatchSpec(DataConfig(max_seq_length=4), 8, seed=1)
    contents = PredictionContents(TokenStore(tmp_path / "store" / "train"), {}, info, spec)
    (tmp_path / "arrays").write_bytes(b"\0" * contents.specs["predictions"].num_bytes)
    with ArrayFile(tmp_path / "arrays", contents.specs, plain_offsets(contents.specs)) as arrays:
        for name, row, rows in contents.stored(vars(found)):
            arrays.write(name, row, rows)
        write_csv(tmp_path / "out.csv", contents, arrays)
    rows = list(csv.reader((tmp_path / "out.csv").open()))
    assert rows[1:] == [["0", "True", "nan 0.5 -2.0", "nan 1.0 3.0"], ["1", "False", "4.0", "5.0"]]
    assert rows[0] == ["id", "truncated", "u", "v"]
    assert shown_labels(found, info, proteins) == [
        {"u": [None, 1.0, None], "v": [None, None, 2.0]},
        {"u": [0.25], "v": [8.0]},
    ]
    with pytest.raises(UserError, match="'id' is a column of its own in this table and the name of a target"):
        check_kind(tmp_path / "out.csv", TargetInfo("token_regression", ["u", "id"]))
