"""Labels that teach nothing or measure nothing: a note or a refusal with the row, in every kind and split."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import proteins_of_pairs, read_labelled
from esm2mega.data.labels.degenerate import check_classes, question_classes
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from tests.unit.runs import SETTINGS

SEQUENCES = ["MKTAYIAK", "LAGVSERT", "WYVTSRQP"]
VARIED: dict[str, list[Any]] = {
    "regression": [1.0, 2.5, 4.0],
    "token_regression": ["1 2 3 4 5 6 7 8", "8 7 6 5 4 3 2 1", "0 0 1 1 2 2 3 3"],
    "classification": ["a", "b", "a"],
    "token_classification": ["CCHHCCHH", "HHHHCCCC", "CHCHCHCH"],
    "multilabel": ["a;b", "b", "a"],
    "contact": [[[3.0 * i, 0.0, 0.0] for i in range(8)], [[0.0, 0.0, 0.1 * i] for i in range(8)]] * 2,
}
"""Labels that differ, by kind."""

CONSTANT: list[tuple[str, list[Any], dict[str, Any], str]] = [
    (
        "regression",
        [0.1, None, 0.1],
        {},
        "each of the 2 numbers of KEY in column 'target' is 0.1, first at ROW1",
    ),
    ("regression", [None, None, 7], {}, "the only number of KEY in column 'target' is 7.0, first at ROW3"),
    (
        "token_regression",
        ["nan " * 7 + "5", "nan " * 8, "5 " * 8],
        {},
        "each of the 9 numbers of KEY in column 'target' is 5.0, first at ROW1",
    ),
    (
        "classification",
        ["b", "b", "b"],
        {"classes": ["a", "b"]},
        "each of the 3 labels of KEY in column 'target' is of the class 'b', first at ROW1",
    ),
    (
        "token_classification",
        ["H" * 8] * 3,
        {"classes": ["C", "H"]},
        "each of the 24 labels of KEY in column 'target' is of the class 'H', first at ROW1",
    ),
    (
        "multilabel",
        ["a;b", "a", "a;b"],
        {},
        "1 of 2 labels are the same for every protein of KEY, from ROW1 on",
    ),
    ("contact", [[[0.0] * 3] * 8] * 3, {}, "every pair of residues of KEY is in contact, from ROW1 on"),
    (
        "contact",
        [[[9.0 * i] * 3 for i in range(8)]] * 3,
        {},
        "no pair of residues of KEY is in contact, from ROW1",
    ),
]
SO = {
    "regression": ("there is nothing to learn", "correlations are not defined"),
    "token_regression": ("there is nothing to learn", "correlations are not defined"),
    "classification": ("there is nothing to learn", "auroc is not defined, and accuracy says little"),
    "token_classification": ("there is nothing to learn", "auroc is not defined, and accuracy says little"),
    "multilabel": (r"nothing is learned of them: a \(1\)", r"their auroc is not defined: a \(1\)"),
    "contact": ("there is nothing to learn", "the precision of contacts says nothing"),
}


def table(folder: Path, labels: list[Any]) -> Path:
    """A CSV of three proteins."""
    path = folder / "t.csv"
    cells = [
        json.dumps(x).replace('"', '""') if isinstance(x, list) else "" if x is None else x for x in labels
    ]
    rows = [f'{sequence},"{cell}"' for sequence, cell in zip(SEQUENCES, cells, strict=False)]
    path.write_text("\n".join(["sequence,target", *rows]) + "\n")
    return path


@pytest.mark.parametrize(("kind", "labels", "settings", "message"), CONSTANT)
def test_labels_that_are_all_equal(
    tmp_path: Path, kind: str, labels: list[Any], settings: dict[str, Any], message: str
) -> None:
    """As a table and as pairs; of training, and of a held-out split, whose training labels differ."""
    task, path = TaskConfig(kind=kind, **settings), table(tmp_path, labels)
    _, info = proteins_of_pairs(list(zip(SEQUENCES, VARIED[kind], strict=False)), task, None, "train")
    for known, key, so in ((None, "data.train", SO[kind][0]), (info, "data.test", SO[kind][1])):
        found, _ = read_labelled(path, task, DataConfig(), known, key)
        pairs, _ = proteins_of_pairs(list(zip(SEQUENCES, labels, strict=True)), task, known, key)
        for proteins, rows in (
            (found, [f"{path}:{line}" for line in (2, 3, 4)]),
            (pairs, [f"{key}[{i}]" for i in range(3)]),
        ):
            expected = message.replace("KEY", key)
            for number, row in enumerate(rows, start=1):
                expected = expected.replace(f"ROW{number}", row)
            notes = "\n".join(proteins.notes)
            assert expected in notes
            assert re.search(so, notes)


@pytest.mark.parametrize("kind", VARIED)
def test_labels_that_differ_need_no_note(tmp_path: Path, kind: str) -> None:
    found, info = read_labelled(
        table(tmp_path, VARIED[kind]), TaskConfig(kind=kind), DataConfig(), None, "data.train"
    )
    assert found.notes == []
    held_out, _ = read_labelled(table(tmp_path, VARIED[kind]), TaskConfig(kind=kind), DataConfig(), info, "x")
    assert held_out.notes == []


def test_a_head_of_one_class_is_refused(tmp_path: Path) -> None:
    """By a run; a table alone may have one class, as one of few rows does."""
    task = TaskConfig(kind="classification")
    found, info = read_labelled(table(tmp_path, ["a"] * 3), task, DataConfig(), None, "data.train")
    with pytest.raises(
        UserError, match=r"is of the class 'a', first at .*t.csv:2, so .*: a head needs two classes"
    ):
        check_classes(info, ["target"], found.notes)
    two = TaskConfig(kind="token_classification", target_columns=["u", "v"])
    found, info = proteins_of_pairs([("MKT", ("CHC", "xxx")), ("LA", ("HC", "xx"))], two, None, "train")
    with pytest.raises(
        UserError, match=r"each of the 5 labels of train in column 'v' is .*, first at train\[0\]"
    ):
        check_classes(info, ["u", "v"], found.notes)
    check_classes(TargetInfo("multilabel", ["a"], [3]), ["target"], [])


def test_one_column_of_several(tmp_path: Path) -> None:
    task = TaskConfig(kind="regression", target_columns=["u", "v"])
    found, info = proteins_of_pairs(
        [("MK", (1, 0.1)), ("LA", (2, 0.1)), ("WY", (4, 0.1))], task, None, "train"
    )
    assert found.notes == [
        "each of the 3 numbers of train in column 'v' is 0.1, first at train[0], so there is nothing to learn"
    ]
    # The mean of equal numbers may be off by a rounding, which is no scale.
    assert info.std == [np.std([1, 2, 4]), 1.0]
    flags = TaskConfig(kind="multilabel", target_columns=["u", "v"])
    found, info = proteins_of_pairs(
        [("MK", ("1", "0")), ("LA", ("1", "")), ("WY", ("0", "0"))], flags, None, "train"
    )
    assert found.notes == ["train has no label of the class 'v'"] and info.untrained == [1]
    held_out, _ = proteins_of_pairs([("MK", ("1", "0")), ("LA", ("0", "1"))], flags, info, "test")
    assert held_out.notes == [
        "1 label is of the class 'v' in test, first at test[1]; training had none of that class, so it "
        "counts as wrong"
    ]


def test_a_number_beside_which_all_others_are_equal() -> None:
    values = [*np.linspace(0, 1, 30), 1e6]
    pairs = [("M" * length, x) for length, x in enumerate(values, 1)]
    found, _ = proteins_of_pairs(pairs, TaskConfig(kind="regression"), None, "train")
    assert found.notes == [
        "train[30]: 1000000.0 in column 'target' is an extreme outlier, next to which all other numbers of "
        "train look the same; check that label"
    ]


BAD_NUMBERS = [
    ("1_000", "'1_000' in column 'target' is not a number; write nothing between thousands"),
    ("1e300", "'1e300' in column 'target' is beyond 1e\\+19"),
    ("-2e19", "'-2e19' in column 'target' is beyond 1e\\+19"),
    ("1e400", "'1e400' in column 'target' is not finite"),
    ("-inf", "'-inf' in column 'target' is not finite"),
    ("Infinity", "'Infinity' in column 'target' is not finite"),
]


@pytest.mark.parametrize(("text", "message"), BAD_NUMBERS)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("kind", ["regression", "token_regression"])
def test_numbers_that_are_none(tmp_path: Path, text: str, message: str, split: str, kind: str) -> None:
    bad = [x if i != 1 else text for i, x in enumerate(VARIED[kind])]
    if kind == "token_regression":
        bad[1] = f"1 2 3 {text} 5 6 7 8"
    task, info = TaskConfig(kind=kind), None
    if split != "train":
        _, info = proteins_of_pairs(list(zip(SEQUENCES, VARIED[kind], strict=True)), task, None, "train")
    with pytest.raises(UserError, match=rf"t\.csv:3: {message}"):
        read_labelled(table(tmp_path, bad), task, DataConfig(), info, f"data.{split}")


def test_numbers_of_programs_that_are_none() -> None:
    task = TaskConfig(kind="regression")
    for value in (1e300, float("inf"), 10**400, np.float32("inf")):
        with pytest.raises(UserError, match=r"^train\[1\]: .* in column 'target' is"):
            proteins_of_pairs([("MK", 1.0), ("LA", value)], task, None, "train")


@pytest.mark.parametrize("bad", ["1e300", "Infinity", "-1e7", str(10**400)])
def test_coordinates_that_are_none(tmp_path: Path, bad: str) -> None:
    """An infinite coordinate is no unknown one."""
    path = tmp_path / "t.csv"
    path.write_text(f'sequence,target\nMKT,"[[0, 0, 0], [{bad}, 0, 0], null]"\n')
    with pytest.raises(UserError, match=r"t\.csv:2: residue 1 in column 'target' has .*none beyond 1e\+06"):
        read_labelled(path, TaskConfig(kind="contact"), DataConfig(), None, "data.train")


def test_a_run_says_it_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its first lines, or in its only one."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    path = table(tmp_path, ["0.1"] * 3)
    command = [
        "finetune",
        *SETTINGS,
        f"run_dir={tmp_path / 'run'}",
        f"data.train={path}",
        "train.max_steps=1",
    ]
    assert main([*command, "task.kind=regression"]) == 0
    said = capsys.readouterr().err
    note = (
        f"data     each of the 3 numbers of data.train in column 'target' is 0.1, first at {path}:2, so there"
    )
    assert note in said and said.index(note) < said.index("done: step 1")
    assert main([*command, f"run_dir={tmp_path / 'none'}", "task.kind=classification"]) == 2
    assert (
        f"first at {path}:2, so there is nothing to learn: a head needs two classes"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "none").exists()


def test_many_numbers_are_no_classes_unless_declared() -> None:
    whole, fractions = [str(number) for number in range(150)], [f"{number / 8}" for number in range(30)]
    task = TaskConfig(kind="classification")
    for names, example in ((whole, "0"), (fractions, "0.125")):
        info = TargetInfo("classification", names)
        with pytest.raises(UserError, match=rf"holds {len(names)} different numbers, such as {example}, .*"):
            question_classes(info, task)
        question_classes(info, replace(task, num_classes=len(names)))
        question_classes(info, replace(task, classes=names))
    for names in (whole[:99], fractions[:19], [f"EC {name}" for name in whole], [*whole, "NA"]):
        question_classes(TargetInfo("classification", names), task)
    residues = TargetInfo("token_classification", fractions)
    with pytest.raises(UserError, match=r"set task.kind=token_regression, and if they are classes, declare"):
        question_classes(residues, replace(task, kind="token_classification"))
