"""Characters or words: decided once for a column, over all splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import LabelledProteins, read_labelled
from esm2mega.data.labels.forms import CHARACTERS, LISTS, WORDS, column_form
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.run import Splits, UserParts, read_splits
from tests.ranks import run_ranks

RESIDUES = TaskConfig(kind="token_classification")


def form(*cells: tuple[Any, int], known: str | None = None) -> str:
    numbered = [(f"x.csv:{line}", cell, length) for line, (cell, length) in enumerate(cells, 2)]
    return column_form("t", numbered, known)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([("CHE", 3)], CHARACTERS),
        ([("C H E", 3)], WORDS),
        ([("10", 1)], WORDS),
        ([("C", 1)], CHARACTERS),  # in both forms the same
        ([("H C", 3), ("C H E", 3)], WORDS),
        ([("H C", 3), ("CHE", 3)], CHARACTERS),
        ([("H C", 3)], CHARACTERS),  # blanks are then refused, or declared
        ([("0 -100", 2), ("nan", 3), ("1", 1)], WORDS),
        ([([0, 1], 2)], LISTS),
        ([("[0, 1]", 2), ("0,1", 3)], LISTS),
        ([("0", 1), ("0, 1", 2)], LISTS),
        ([("[0, 1]", 2), ("CHE", 3)], CHARACTERS),
        ([("[0 1]", 2), ("0 1 1", 3)], WORDS),
    ],
)
def test_all_cells_decide(cells: list[tuple[Any, int]], expected: str) -> None:
    assert form(*cells) == form(*cells[::-1]) == expected


def test_a_declared_blank_is_a_character() -> None:
    cells = [("x.csv:2", "H ", 2), ("x.csv:3", "[0, 1]", 2)]
    assert column_form("t", cells) == LISTS
    assert column_form("t", cells, declared=["H", " "]) == CHARACTERS


def test_cells_of_two_forms_are_refused_where_the_fewer_are() -> None:
    with pytest.raises(UserError, match=r"^x.csv:4: holds a word .* 't', which holds a char.* at x.csv:2;"):
        form(("CHE", 3), ("CH", 2), ("C H", 2))
    with pytest.raises(UserError, match=r"^x.csv:3: holds a character .*, which holds a word .* at x.csv:2;"):
        form(("C H E", 3), ("CH", 2), ("10", 1))
    with pytest.raises(UserError, match=r"^x.csv:2: holds a word .*, which holds a char.* in training;"):
        form(("C H E", 3), known=CHARACTERS)
    # Lists of training say nothing about text of another table.
    assert form(("CHE", 3), known=LISTS) == CHARACTERS and form(("C", 1), known=WORDS) == WORDS


def labels(proteins: LabelledProteins, info: TargetInfo) -> list[str]:
    return ["-" if number < 0 else info.names[number] for (number,) in proteins.labels.tolist()]


def splits(folder: Path, train: str, valid: str) -> Splits:
    (folder / "train.csv").write_text(train)
    (folder / "valid.csv").write_text(valid)
    data = DataConfig(train=str(folder / "train.csv"), valid=str(folder / "valid.csv"))
    return read_splits(data, RESIDUES, UserParts())


def test_one_decision_for_all_splits(tmp_path: Path) -> None:
    """The training proteins have one residue each; what their cells mean shows in the validation split."""
    train = "sequence,target\nM,C\nK,H\n"
    found = splits(tmp_path, train, "sequence,target\nMK,C H\n")
    assert found.info.forms == [WORDS] and labels(found.of["valid"], found.info) == ["C", "H"]
    found = splits(tmp_path, train, "sequence,target\nMK,CH\n")
    assert found.info.forms == [CHARACTERS] and labels(found.of["valid"], found.info) == ["C", "H"]
    # Three characters one of which is a blank, or two words for three residues: never a class of a blank.
    for text, message in (
        ("sequence,target\nMKT,C H\nMK,C H\n", r"valid.csv:2: 2 labels in column 'target' for 3 residues"),
        ("sequence,target\nMKT,C H\nMK,HC\n", r"valid.csv:2: ' ' at residue 1 in column 'target'"),
        (
            "sequence,target\nMKT,C H H\nMK,HC\n",
            r"valid.csv:3: holds a char.* at .*valid.csv:2; write all",
        ),
    ):
        with pytest.raises(UserError, match=message):
            splits(tmp_path, train, text)


def test_the_form_of_training_holds_for_other_tables(tmp_path: Path) -> None:
    words = TargetInfo("token_classification", ["1", "10"], forms=[WORDS])
    table = tmp_path / "t.csv"
    table.write_text("sequence,target\nMK,10\n")
    with pytest.raises(UserError, match=r"t.csv:2: holds a character .*, which holds a word .* in training"):
        read_labelled(table, RESIDUES, DataConfig(), words, "--data")
    table.write_text("sequence,target\nM,10\nMK,1 10\n")
    found, _ = read_labelled(table, RESIDUES, DataConfig(), words, "--data")
    assert labels(found, words) == ["10", "1", "10"]
    # A checkpoint of an earlier version does not say; then the table does.
    state = {key: value for key, value in words.to_dict().items() if key != "forms"}
    old = TargetInfo.from_dict(json.loads(json.dumps(state)))
    assert old == words and old.forms == []
    assert labels(read_labelled(table, RESIDUES, DataConfig(), old, "--data")[0], old) == ["10", "1", "10"]
    assert TargetInfo.from_dict(words.to_dict()).forms == [WORDS]


def test_each_column_has_a_form_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('sequence,a,b,c\nMK,CH,1 20,"[0, 1]"\nL,H,3,[1]\n')
    task = TaskConfig(kind="token_classification", target_columns=["a", "b", "c"])
    found, info = read_labelled(table, task, DataConfig(), None, "data.train")
    assert info.forms == [CHARACTERS, WORDS, LISTS]
    named = [
        [target.names[i] for i in column] for target, column in zip(info.targets, found.labels.T, strict=True)
    ]
    assert named == [["C", "H", "H"], ["1", "20", "3"], ["0", "1", "1"]]


# Each rank has a copy of its own, and that of rank 1 has lost the line that decides.
DECIDE = """
import os, sys
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.finetune.run import UserParts, read_splits
data = DataConfig(train=f"{sys.argv[1]}/{os.environ['RANK']}.csv")
print(read_splits(data, TaskConfig(kind="token_classification"), UserParts()).info.forms)
"""


@pytest.mark.distributed
def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    (tmp_path / "0.csv").write_text("sequence,target\nM,C\nMK,C H\n")
    (tmp_path / "1.csv").write_text("sequence,target\nM,C\nK,H\n")
    results = run_ranks(["-c", DECIDE, str(tmp_path)], 2, tmp_path)
    assert [result.stdout for result in results] == ["['words']\n"] * 2
    assert splits(tmp_path, (tmp_path / "1.csv").read_text(), "sequence,target\nL,H\n").info.forms == [
        CHARACTERS
    ]
