"""DeepLoc 2's table: which proteins, which labels, and splits that can be repeated."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.load import load_run
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.data.benchmarks.deeploc2 import LOCATIONS, DeepLocOptions, prepare_deeploc2
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.errors import UserError

RNG = np.random.default_rng(5)
HEADER = ["", "ACC", "Kingdom", "Partition", "Membrane", *LOCATIONS, "Sequence"]


def write(folder: Path, count: int = 50, **changed: Any) -> Path:
    """`count` proteins of fitting length, and two that are too short and too long."""
    path = folder / "Swissprot_Train_Validation_dataset.csv"
    lengths = [99, 1027, 100, 1026, *RNG.integers(100, 140, count - 2).tolist()]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        table.writeheader()
        for number, length in enumerate(lengths):
            row: dict[str, Any] = dict(zip(LOCATIONS, RNG.integers(0, 2, 10).astype(float), strict=True))
            row |= {"": number, "ACC": f"P{number}", "Kingdom": "Metazoa", "Partition": number % 5}
            row |= {"Membrane": float(number % 3 == 0), "Sequence": "".join(RNG.choice(list("LAGV"), length))}
            table.writerow(row | changed)
    return path


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    return {path.stem: list(csv.DictReader(path.open())) for path in out.glob("*.csv")}


def test_a_seeded_random_split(tmp_path: Path) -> None:
    path = write(tmp_path)
    lines = prepare_deeploc2(path, tmp_path / "a", DeepLocOptions(valid_fraction=0.1))
    assert "2 proteins have fewer than 100 or more than 1026 residues" in lines[-2]
    found = tables(tmp_path / "a")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 35, "valid": 5, "test": 10}
    ids = [row["id"] for rows in found.values() for row in rows]
    assert sorted(ids) == sorted(f"P{n}" for n in range(2, 52))
    assert all(row["target"] == str(int(int(row["id"][1:]) % 3 == 0)) for row in found["train"])
    options = json.loads((tmp_path / "a/manifest.json").read_text())["options"]
    assert (options["test_fraction"], options["valid_fraction"], options["seed"]) == (0.2, 0.1, 1234)
    assert "test_partition" not in options
    prepare_deeploc2(path, tmp_path / "b", DeepLocOptions(valid_fraction=0.1))
    prepare_deeploc2(path, tmp_path / "c", DeepLocOptions(valid_fraction=0.1, seed=2))
    assert tables(tmp_path / "b") == found != tables(tmp_path / "c")
    run = load_run("deeploc2", ["model.size=tiny"])
    validate(run, 1)
    validate_task(run)
    proteins, info = read_labelled(tmp_path / "a/train.csv", run.task, run.data, None, "data.train")
    assert info.names == ["0", "1"] and max(proteins.lengths) <= run.data.max_seq_length - 2


def test_partitions_and_ten_flags(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    command = ["prepare", "deeploc2", "--source", str(path), "--out", str(out), "--labels", "locations"]
    assert main([*command, "--test-partition", "4", "--valid-partition", "1"]) == 0
    found = tables(out)
    for split, partitions in (("train", {0, 2, 3}), ("valid", {1}), ("test", {4})):
        assert {int(row["id"][1:]) % 5 for row in found[split]} == partitions
    assert list(found["train"][0]) == ["id", "sequence", *LOCATIONS]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["left_out"] == 2
    assert manifest["options"] == {
        "labels": "locations",
        "min_length": 100,
        "max_length": 1026,
        "test_partition": 4,
        "valid_partition": 1,
    }
    columns = ", ".join(LOCATIONS)
    settings = ["model.size=tiny", "task.kind=multilabel", "data.max_seq_length=1028"]
    run = load_run(None, [*settings, f"task.target_columns=[{columns}]"])
    proteins, info = read_labelled(out / "train.csv", run.task, run.data, None, "data.train")
    assert proteins.labels.shape == (len(found["train"]), 10) and info.names == list(LOCATIONS)


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"Membrane": "0.5"}, {}, r"dataset.csv:4: Membrane of 'P2' is '0.5', not 0 or 1"),
        ({"Partition": "5"}, {}, "Partition of 'P2' is '5', not 0 to 4"),
        ({}, {"test_fraction": 1.0}, "must be at least 0 and less than 1 together"),
        ({}, {"test_partition": 1, "valid_partition": 1}, "--valid-partition 1 is the one to test on"),
        ({}, {"valid_partition": 1}, "--valid-partition needs --test-partition"),
        ({}, {"test_partition": 1, "test_fraction": 0.9}, "--test-fraction 0.9 is of a split at random"),
        ({}, {"test_partition": 1, "valid_fraction": 0.0}, "--valid-fraction 0.0 is of a split at random"),
        ({}, {"min_length": 500, "max_length": 499}, "--min-length 500 and --max-length 499"),
        ({}, {"min_length": 2000, "max_length": 3000}, "no protein has 2,000 to 3,000 residues"),
        ({"Partition": "1"}, {"test_partition": 1}, "leaves no protein to train on"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, changed: dict[str, str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_deeploc2(write(tmp_path, **changed), tmp_path / "out", DeepLocOptions(**options))
    assert not (tmp_path / "out").exists()
