"""Splits that FASTA headers name, as FLIP and biotrainer write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.data.labels.sets import split_of
from esm2mega.errors import UserError
from esm2mega.finetune.run import UserParts, read_splits

FLIP = (
    ">a TARGET=1 SET=train VALIDATION=False\nMK\n>b TARGET=2 SET=train VALIDATION=True\nLA\n"
    ">c TARGET=3 SET=test VALIDATION=False\nWY\n>d TARGET=4 SET=train VALIDATION=False\nVV\n"
    ">e TARGET=5 SET=nan VALIDATION=\nGG\n"
)
BIOTRAINER = FLIP.replace("SET=train VALIDATION=True", "SET=val").replace(" VALIDATION=False", "")
NUMBERS = TaskConfig(kind="regression", target_columns=["TARGET"])


@pytest.mark.parametrize("text", [FLIP, BIOTRAINER], ids=["flip", "biotrainer"])
def test_each_split_takes_its_own_proteins(tmp_path: Path, text: str) -> None:
    path = tmp_path / "all.fasta"
    path.write_text(text)
    data = DataConfig(train=str(path), valid=str(path), test=str(path))
    found = read_splits(data, NUMBERS, UserParts()).of
    assert {split: proteins.ids for split, proteins in found.items()} == {
        "train": ["a", "d"],
        "valid": ["b"],
        "test": ["c"],
    }
    note = f"3 proteins of {path} have another SET than data.train takes, and are left out"
    assert found["train"].notes == [note]
    with pytest.raises(
        UserError, match=r"all.fasta:3: 'b' belongs to another set than .*all.fasta:1; give --data"
    ):
        read_labelled(path, NUMBERS, DataConfig(), None, "--data")
    path.write_text("".join(f">{n} TARGET=1 SET=test\nMK\n" for n in range(3)))
    assert len(read_labelled(path, NUMBERS, DataConfig(), None, "--data")[0]) == 3
    with pytest.raises(UserError, match=r"data.train=.*all.fasta: holds no proteins of this SET"):
        read_labelled(path, NUMBERS, DataConfig(), None, "data.train")


def test_a_file_of_labels_names_them_too(tmp_path: Path) -> None:
    sequences, labelled = tmp_path / "s.fasta", tmp_path / "l.fasta"
    sequences.write_text(">a\nMK\n>b\nLA\n>c\nWYV\n")
    labelled.write_text(">b SET=val\nHC\n>a SET=train\nCH\n>c SET=test\nHHH\n")
    task = TaskConfig(kind="token_classification", label_file=str(labelled))
    data = DataConfig(train=str(sequences), valid=str(sequences), test=str(sequences))
    found = read_splits(data, task, UserParts())
    assert {split: proteins.ids for split, proteins in found.of.items()} == {
        "train": ["a"],
        "valid": ["b"],
        "test": ["c"],
    }
    assert [found.info.names[i] for (i,) in found.of["valid"].labels.tolist()] == ["H", "C"]


def test_other_values_are_refused() -> None:
    assert split_of("x:1", "p", "", None) is None
    for set_name, validation, message in (
        ("dev", None, "x:1: SET of 'p' is 'dev', not train, val or test"),
        ("train", "yes", "x:1: VALIDATION of 'p' is 'yes', not True or False"),
    ):
        with pytest.raises(UserError, match=message):
            split_of("x:1", "p", set_name, validation)
