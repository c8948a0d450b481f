"""Data directories of Model Zoo: read in the order of ``meta.dat``, by every command that reads a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.errors import UserError
from esm2mega.vocabulary import decode
from tests.unit.runs import SETTINGS

TASK = TaskConfig(kind="classification", num_classes=2)
ROWS = {"MKTA": "0", "LAGVSE": "1", "RT": "1"}


def row(sequence: str, label: str) -> str:
    """As their script writes it: 12 tokens, padded with the id 0, which their documentation names."""
    ids = {letter: number for number, letter in enumerate("LAGVSERTIDPKQNFYMHWC", 4)}
    tokens = [0, *(ids[letter] for letter in sequence), 2]
    rest = 12 - len(tokens)
    return f'"{tokens + [0] * rest}","{[1] * len(tokens) + [0] * rest}",{label}\n'


def write(folder: Path, column: str = "labels", meta: str = "b.csv 2\na.csv 1\n") -> Path:
    folder.mkdir()
    rows = [row(*item) for item in ROWS.items()]
    header = f"input_ids,attention_mask,{column}\n"
    (folder / "b.csv").write_text(header + rows[0] + rows[1])
    (folder / "a.csv").write_text(header + rows[2])
    (folder / "meta.dat").write_text(meta)
    return folder


@pytest.mark.parametrize("column", ["labels", "label", "target"])
def test_files_are_read_in_the_order_of_the_list(column: str, tmp_path: Path) -> None:
    proteins, info = read_labelled(write(tmp_path / "d", column), TASK, DataConfig(), None, "data.train")
    assert [decode(proteins.residues(number)) for number in range(3)] == list(ROWS)
    assert proteins.labels is not None and proteins.labels.tolist() == [0, 1, 1]
    assert (info.names, list(proteins.ids)) == (["0", "1"], ["1", "2", "3"])


def test_a_directory_without_a_list_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole training on such a directory: tests/cli/test_migrate_cerebras.py."""
    command = ["finetune", *SETTINGS, f"data.train={tmp_path}", "task.kind=classification"]
    assert main([*command, "train.eval_every=0"]) == 2
    assert f"data.train={tmp_path}: no such file; give a table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("b.csv 3\n", r"b.csv: has 2 rows, .*meta.dat says 3; copy both again"),
        ("b.csv\n", r"meta.dat:1: is 'b.csv', not the name of a file and its rows"),
        ("b.csv 2\n../d/a.csv 1\n", r"meta.dat:2: refused: ../d/a.csv leads outside the directory"),
        ("/etc/passwd 1\n", "refused: /etc/passwd leads outside"),
        ("c.csv 2\n", r"meta.dat:1: names c.csv, which is missing"),
        ("\n", "holds no proteins"),
    ],
)
def test_what_is_refused(meta: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_labelled(write(tmp_path / "d", meta=meta), TASK, DataConfig(), None, "data.train")


def test_columns_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'target' among .*; is this a data_dir of Model Zoo"):
        read_labelled(write(tmp_path / "d", "other"), TASK, DataConfig(), None, "data.train")
    folder = write(tmp_path / "e")
    (folder / "b.csv").write_text("input_ids,labels\n[0;5;2],1\n")
    with pytest.raises(UserError, match="no column 'attention_mask'"):
        read_labelled(folder, TASK, DataConfig(), None, "data.train")
