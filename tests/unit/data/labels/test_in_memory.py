"""Proteins in memory, in the types of other programs: what they hold is read, anything else is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import proteins_of_pairs
from esm2mega.data.labels.in_memory import sequences_in_memory
from esm2mega.errors import UserError
from esm2mega.vocabulary import decode

SEQUENCES = ["MKTAY", "LAG", "WYRQPK"]
VALUES = [1.5, math.nan, -2.0]
REGRESSION = TaskConfig(kind="regression")
COLUMNS = {"sequence": SEQUENCES, "target": VALUES}
ROWS = [{"sequence": s, "target": v} for s, v in zip(SEQUENCES, VALUES, strict=True)]
PAIRS = list(zip(SEQUENCES, VALUES, strict=True))


class Pairs(Dataset[Any]):
    """A map-style data set whose indices never end by themselves, as many are written."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> Any:
        return SEQUENCES[number % 3], torch.tensor(VALUES[number % 3])


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> Any:
        return ROWS[number]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from PAIRS


def arrow() -> Any:
    return pytest.importorskip("pyarrow").table(COLUMNS)


def pandas() -> Any:
    """With an index that has gaps and is not in order, and a column more."""
    frame = pytest.importorskip("pandas").DataFrame({**COLUMNS, "other": [1, 2, 3]})
    frame.index = [7, 3, 7]
    return frame


def polars() -> Any:
    return pytest.importorskip("polars").DataFrame(COLUMNS)


def hugging_face() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(COLUMNS)


def streamed() -> Any:
    return hugging_face().to_iterable_dataset()


@pytest.mark.parametrize(
    "given",
    [
        PAIRS,
        tuple(PAIRS),
        [list(pair) for pair in PAIRS],
        [(s, np.float64(v)) for s, v in PAIRS],
        [(s, torch.tensor(v)) for s, v in PAIRS],
        [(s, None if math.isnan(v) else {"target": v}) if not math.isnan(v) else (s, v) for s, v in PAIRS],
        (pair for pair in PAIRS),
        zip(SEQUENCES, VALUES, strict=True),
        np.array([(s, "" if math.isnan(v) else str(v)) for s, v in PAIRS]),
        Pairs(),
        Subset(Pairs(), [0, 1, 2]),
        Stream(),
        Rows(),
        ROWS,
        iter(ROWS),
        COLUMNS,
        {"sequence": np.array(SEQUENCES), "target": np.array(VALUES), "other": [1]},
        {"sequence": SEQUENCES, "target": torch.tensor(VALUES, dtype=torch.float64)},
        arrow,
        pandas,
        polars,
        hugging_face,
        streamed,
    ],
)
def test_all_forms_hold_the_same_proteins(given: Any) -> None:
    given = given() if callable(given) else given
    proteins, _ = proteins_of_pairs(given, REGRESSION, None, "data.train", DataConfig())
    assert [decode(proteins.residues(row)) for row in range(len(proteins))] == SEQUENCES
    assert proteins.labels is not None
    np.testing.assert_array_equal(proteins.labels[:, 0], VALUES)
    assert list(proteins.ids) == ["0", "1", "2"]


def test_rows_and_tables_have_the_columns_of_the_configuration() -> None:
    """Other names, ids, and a mask, which pairs cannot have."""
    data = DataConfig(sequence_column="text", id_column="name")
    task = TaskConfig(kind="token_classification", target_columns=["states"], mask_column="seen")
    table = {
        "text": ["MK", "LAG"],
        "states": ["HE", "HCH"],
        "seen": ["01", "111"],
        "name": ["x", None],
    }
    rows = [{column: cells[number] for column, cells in table.items()} for number in range(2)]
    for given in (table, rows):
        proteins, info = proteins_of_pairs(given, task, None, "data.train", data)
        assert list(proteins.ids) == ["x", "1"] and info.names == ["C", "E", "H"]
        assert proteins.labels is not None and proteins.labels[:, 0].tolist() == [-100, 1, 2, 0, 2]
    with pytest.raises(UserError, match=r"data.train\[0\]: a pair has no column for task.mask_column=seen"):
        proteins_of_pairs([("MK", "HE")], task, None, "data.train", data)


def test_tokenised_rows_are_read_as_those_of_files() -> None:
    task, data = (
        TaskConfig(kind="regression", target_columns=["labels"]),
        DataConfig(sequence_column="input_ids"),
    )
    table = {
        "input_ids": torch.tensor([[0, 20, 15, 2, 1], [0, 4, 5, 6, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1] * 5]),
        "labels": [1, 2],
    }
    proteins, _ = proteins_of_pairs(table, task, None, "data.train", data)
    assert [decode(proteins.residues(row)) for row in range(2)] == ["MK", "LAG"]


def test_several_values_of_a_pair() -> None:
    task = TaskConfig(kind="regression", target_columns=["u", "v"])
    for value in ((1.0, None), [1.0, math.nan], np.array([1.0, math.nan]), {"v": None, "u": 1.0, "w": 3}):
        proteins, _ = proteins_of_pairs([("MK", value), ("LA", (2.0, 5.0))], task, None, "data.train")
        assert proteins.labels is not None
        np.testing.assert_array_equal(proteins.labels, [[1.0, math.nan], [2.0, 5.0]])
    for value, message in (
        ((1.0,), r"data.train\[0\]: 1 values for task.target_columns=\['u', 'v'\]; give one for each"),
        ({"u": 1.0}, r"data.train\[0\]: no key 'v' among u; correct task.target_columns"),
    ):
        with pytest.raises(UserError, match=message):
            proteins_of_pairs([("MK", value)], task, None, "data.train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train.csv", "data.train is the text 'train.csv'; .* a file is named by data.train=FILE"),
        (Path("train.csv"), "a file is named by data.train=FILE"),
        (["MK", "LA"], r"data.train\[0\] is 'MK', not a pair; give pairs"),
        ([("MK", 1.0, "x")], r"data.train\[0\] is \('MK', 1.0, 'x'\), not a pair"),
        ([(1.0, "MK")], r"data.train\[0\]: the sequence is of type float, not text"),
        ([(None, 1.0)], r"data.train\[0\]: the sequence is missing, not text"),
        ([("MK", 1.0), ("", 1.0)], r"data.train\[1\] is empty; give residues"),
        ([("MK", "high")], r"data.train\[0\]: 'high' in column 'target' is not a number"),
        ([], "data.train: holds no proteins; give some"),
        ({}, "data.train: no column 'sequence' among"),
        (
            dict(PAIRS),
            "data.train: no column 'sequence' among MKTAY, LAG, WYRQPK; correct data.sequence_column",
        ),
        ({"sequences": SEQUENCES, "labels": VALUES}, "no column 'sequence' among sequences, labels; correct"),
        ({"train": COLUMNS, "test": COLUMNS}, "no column 'sequence' among train, test"),
        ({"sequence": "MK", "target": 1.0}, "the column 'sequence' is one str; give a list of cells"),
        (
            {"sequence": ["MK"], "target": [1.0, 2.0]},
            "columns have different lengths: 'sequence' has 1, 'target' has 2",
        ),
        ([{"sequence": "MK"}], r"data.train\[0\]: no column 'target' among sequence"),
        (
            DataLoader(Pairs(), batch_size=2),
            "data.train is a DataLoader, which yields batches; give its data set",
        ),
        (3, "data.train is of type int; give pairs"),
    ],
)
def test_other_shapes_are_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        proteins_of_pairs(given, REGRESSION, None, "data.train", DataConfig())
    assert "\n" not in str(caught.value)


def test_sequences_without_labels() -> None:
    for given in (SEQUENCES, np.array(SEQUENCES), iter(SEQUENCES), ROWS, COLUMNS, Rows()):
        assert sequences_in_memory(given, "sequence") == SEQUENCES
    for make in (arrow, pandas, polars, hugging_face):
        assert sequences_in_memory(make(), "sequence") == SEQUENCES
    for given, message in (
        ("MKTAY", "sequences is the text 'MKTAY'; give a list of sequences, rows .* and `esm2mega embed`"),
        (5, "sequences is of type int; give a list of sequences, rows"),
        (Path("x.fasta"), "sequences is the text 'x.fasta'; .* read by `esm2mega predict` and"),
        (PAIRS, r"sequences\[0\]: the sequence is of type tuple, not text"),
        ({"seq": SEQUENCES}, "sequences: no column 'sequence' among seq"),
        (["MK", None], r"sequences\[1\]: the sequence is missing"),
        (["MK", " "], r"sequences\[1\] is empty"),
    ):
        with pytest.raises(UserError, match=message):
            sequences_in_memory(given, "sequence")
