"""Data directories for Model Zoo: read as its loader reads them, and by us as the tables beside them."""

from __future__ import annotations

import ast
import csv
from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.benchmarks.deeploc2 import DeepLocOptions, prepare_deeploc2
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.errors import UserError
from esm2mega.vocabulary import VOCAB
from tests.unit.data.benchmarks.test_deeploc2 import write


def as_their_loader(data_dir: Path) -> list[dict[str, np.ndarray]]:
    """What the loader of Model Zoo yields, in its words: files and rows of ``meta.dat``, three columns."""
    found = []
    for line in (data_dir / "meta.dat").read_text().splitlines():
        name, count = line.split()
        with (data_dir / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == int(count)
        for row in rows:
            columns = ("input_ids", "attention_mask", "labels")
            found.append({column: np.array(ast.literal_eval(row[column])) for column in columns})
            assert row["label"] == row["labels"]
    return found


def test_the_loader_finds_what_the_tables_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, features = write(tmp_path, 20), tmp_path / "tables", tmp_path / "features"
    command = ["prepare", "deeploc2", "--source", str(source), "--out", str(out), "--features", str(features)]
    assert main([*command, "--valid-fraction", "0.2"]) == 0
    said = capsys.readouterr().out
    assert f"{features}: 1 proteins of more than 1,024 residues are cut to these" in said
    assert f"{features / 'train'}: " in said
    assert {path.name for path in features.iterdir()} == {"train", "valid", "test"}
    for split in ("train", "valid", "test"):
        with (out / f"{split}.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        for row, found in zip(table, as_their_loader(features / split), strict=True):
            length = min(len(row["sequence"]), 1024) + 2
            assert found["input_ids"].shape == found["attention_mask"].shape == (1026,)
            assert found["attention_mask"].tolist() == [1] * length + [0] * (1026 - length)
            tokens = [VOCAB[number] for number in found["input_ids"]]
            assert tokens[0] == "<cls>" and tokens[length - 1] == "<eos>"
            assert set(tokens[length:]) <= {"<pad>"}
            assert "".join(tokens[1 : length - 1]) == row["sequence"][:1024]
            assert found["labels"].shape == () and str(found["labels"]) == row["target"]
        task, data = TaskConfig(kind="classification"), DataConfig(max_seq_length=1028)
        tables, _ = read_labelled(out / f"{split}.csv", task, data, None, "data.train")
        proteins, info = read_labelled(features / split, task, data, None, "data.train")
        assert tables.labels is not None and proteins.labels is not None
        assert tables.labels.tolist() == proteins.labels.tolist() and set(info.names) <= {"0", "1"}


def test_both_directories_or_none(tmp_path: Path) -> None:
    source = write(tmp_path, 5)
    options = DeepLocOptions(labels="locations")
    with pytest.raises(UserError, match="has one label for each protein; give --labels membrane"):
        prepare_deeploc2(source, tmp_path / "out", options, tmp_path / "features")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists already"):
        prepare_deeploc2(source, tmp_path / "out", DeepLocOptions(), tmp_path / "there")
    assert not (tmp_path / "out").exists() and not (tmp_path / "features").exists()
