"""One table is cut into splits: near the shares, no group in two of them, the same on every start."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.data.labels.rows import Row, Table, read_table
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.data.labels.splits import cut, rows_by_split, with_split_column, write_splits
from esm2mega.errors import UserError

RNG = np.random.default_rng(3)
LETTERS = list("LAGVSERTIDPKQNFYMHWC")
SEQUENCES = ["".join(RNG.choice(LETTERS, n)) for n in RNG.integers(5, 30, 200)]
TASK = TaskConfig("regression")


def write(path: Path, rows: list[tuple[str, ...]], columns: str = "id,sequence,target") -> Path:
    path.write_text("\n".join([columns, *(",".join(row) for row in rows)]) + "\n")
    return path


def splits(path: Path, **keys: object) -> dict[str, Table]:
    data = DataConfig(**keys)
    return cut(read_table(path, with_split_column(TASK, data), data, "data.train"), data)


def ids(tables: dict[str, Table]) -> dict[str, list[str]]:
    return {split: [row[1] for row in table.rows] for split, table in tables.items()}


def plain(path: Path) -> Path:
    return write(path, [(f"p{i}", s, str(i)) for i, s in enumerate(SEQUENCES)])


def test_shares_are_met_to_a_protein_and_every_protein_is_in_one_split(tmp_path: Path) -> None:
    found = ids(splits(plain(tmp_path / "t.csv"), split="0.8/0.1/0.1"))
    assert {split: len(names) for split, names in found.items()} == {"train": 160, "valid": 20, "test": 20}
    assert sorted(sum(found.values(), [])) == sorted(f"p{i}" for i in range(200))
    # In the order of the table.
    assert all(names == sorted(names, key=lambda name: int(name[1:])) for names in found.values())
    two = ids(splits(tmp_path / "t.csv", split="0.7/0.3"))
    assert {split: len(names) for split, names in two.items()} == {"train": 140, "valid": 60}


def test_the_cut_depends_on_its_seed_and_the_proteins_alone(tmp_path: Path) -> None:
    first = ids(splits(plain(tmp_path / "t.csv"), split="0.8/0.1/0.1"))
    rows = [(f"p{i}", s.lower(), str(-i)) for i, s in enumerate(SEQUENCES)]
    other_order = write(tmp_path / "o.csv", rows[::-1])
    assert {k: set(v) for k, v in ids(splits(other_order, split="0.8/0.1/0.1")).items()} == {
        k: set(v) for k, v in first.items()
    }
    other_seed = ids(splits(tmp_path / "t.csv", split="0.8/0.1/0.1", split_seed=1))
    shared = len(set(first["test"]) & set(other_seed["test"]))
    assert shared < 10  # 2 are expected, of 20 of 200


def test_equal_sequences_stay_together(tmp_path: Path) -> None:
    rows = [(f"p{i}", SEQUENCES[i % 50], str(i)) for i in range(200)]
    found = splits(write(tmp_path / "t.csv", rows), split="0.5/0.3/0.2")
    owners = [{row[2].tobytes() for row in table.rows} for table in found.values()]
    assert not any(a & b for i, a in enumerate(owners) for b in owners[:i])
    assert sum(map(len, owners)) == 50


def test_groups_of_a_column_stay_together(tmp_path: Path) -> None:
    families = RNG.integers(0, 30, 200)
    rows = [(f"p{i}", s, str(i), f"f{families[i]}") for i, s in enumerate(SEQUENCES)]
    path = write(tmp_path / "t.csv", rows, "id,sequence,target,family")
    found = ids(splits(path, split="0.6/0.2/0.2", split_by="family"))
    family = {name: group for name, _, _, group in rows}
    owners = [{family[name] for name in names} for names in found.values()]
    assert sum(map(len, owners)) == len(set(family.values()))
    # The largest group decides how far from the shares the splits are.
    largest = max(Counter(family.values()).values())
    for share, names in zip((0.6, 0.2, 0.2), found.values(), strict=True):
        assert abs(len(names) - share * 200) <= largest
    tables = splits(path, split="0.5/0.5", split_by="family").values()
    assert all(set(row[3]) == {"target"} for table in tables for row in table.rows)
    with pytest.raises(
        UserError, match=r"t.csv:202: the sequence is in another group of the column 'family'"
    ):
        splits(write(path, [*rows, ("x", SEQUENCES[0], "1", "other")], "id,sequence,target,family"),
               split="0.5/0.5", split_by="family")  # fmt: skip
    with pytest.raises(UserError, match=r"t.csv:2: the column 'family' of groups is empty"):
        splits(
            write(path, [("x", "MK", "1", " ")], "id,sequence,target,family"),
            split="0.5/0.5",
            split_by="family",
        )


def test_a_column_may_name_the_splits(tmp_path: Path) -> None:
    rows = [
        ("a", "MK", "1", "train"),
        ("b", "ML", "2", "Test"),
        ("c", "MV", "3", "val"),
        ("d", "MA", "4", "TRAIN"),
    ]
    path = write(tmp_path / "t.csv", rows, "id,sequence,target,set")
    assert ids(splits(path, split_by="set")) == {"train": ["a", "d"], "valid": ["c"], "test": ["b"]}
    with pytest.raises(UserError, match=r"t.csv:3: set='holdout' is not one of train, val, test, valid"):
        splits(write(path, [rows[0], ("b", "M", "2", "holdout")], "id,sequence,target,set"), split_by="set")
    with pytest.raises(UserError, match=r"data.split_by=set: no row of .* has train there; give some"):
        splits(write(path, rows[1:2], "id,sequence,target,set"), split_by="set")
    with pytest.raises(UserError, match=r"no column 'fold' among id, sequence, target, set"):
        splits(path, split_by="fold")
    with pytest.raises(UserError, match=r"data.split_by=target is in task.target_columns too"):
        splits(path, split_by="target")


def test_a_split_without_proteins_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [(f"p{i}", "MKV", str(i)) for i in range(9)])
    with pytest.raises(UserError, match=r"is left for part 2 \(valid\), since the 9 proteins .* 1 groups"):
        splits(path, split="0.8/0.1/0.1")


def test_the_splits_are_written_and_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    rows = [(f"p{i}", s, str(i / 8)) for i, s in enumerate(SEQUENCES[:20])]
    path = write(tmp_path / "t.csv", rows)
    found = splits(path, split="0.8/0.1/0.1")
    write_splits(str(tmp_path / "run"), found, ["target"], "plain", is_resumed=False)
    for split, names in ids(found).items():
        with (tmp_path / "run" / "splits" / f"{split}.csv").open() as file:
            written = list(csv.DictReader(file))
        assert [(row["id"], row["sequence"], row["target"]) for row in written] == [
            row for row in rows if row[0] in names
        ]
    write_splits(str(tmp_path / "run"), found, ["target"], "plain", is_resumed=True)
    other = splits(path, split="0.8/0.1/0.1", split_seed=5)
    before = (tmp_path / "run" / "splits" / "train.csv").read_bytes()
    with pytest.raises(UserError, match=r"splits/train.csv: the run was begun with another split"):
        write_splits(str(tmp_path / "run"), other, ["target"], "plain", is_resumed=True)
    assert (tmp_path / "run" / "splits" / "train.csv").read_bytes() == before
    write_splits(str(tmp_path / "run"), other, ["target"], "plain", is_resumed=False)


@pytest.mark.parametrize("numbers", ["plain", "decimal_comma"])
def test_numbers_of_a_spreadsheet_are_written_as_text_is_read(tmp_path: Path, numbers: str) -> None:
    """Its cells are numbers, whatever `data.numbers` says of text."""
    labels = [1.234, 0.91, 12, "0,5" if numbers == "decimal_comma" else "0.5"]
    rows: list[Row] = [
        (f"x:{n}", f"p{n}", np.full(4, 5, dtype=np.uint8), {"target": x}) for n, x in enumerate(labels)
    ]
    write_splits(str(tmp_path), {"test": Table("x", "data.test", rows, [])}, ["target"], numbers, False)
    data = DataConfig(numbers=numbers)
    info = TargetInfo("regression", ["target"])
    read, _ = read_labelled(tmp_path / "splits/test.csv", TaskConfig(kind="regression"), data, info, "--data")
    assert read.labels.ravel().tolist() == [1.234, 0.91, 12.0, 0.5]


def test_letters_without_a_token_are_read_as_such_again(tmp_path: Path) -> None:
    """And X, which has one, is another sequence."""
    path = write(
        tmp_path / "t.csv", [("a", "LAJ*", "1"), ("b", "LAXX", "2"), ("c", "LAGV", "3"), ("d", "GGGG", "4")]
    )
    found = splits(path, split="0.5/0.25/0.25")
    write_splits(str(tmp_path), found, ["target"], "plain", is_resumed=False)
    for split, table in found.items():
        again = read_table(tmp_path / "splits" / f"{split}.csv", TASK, DataConfig(), "--data")
        assert [row[2].tolist() for row in again.rows] == [row[2].tolist() for row in table.rows]


def test_the_words_of_a_column_are_those_of_the_field() -> None:
    rows = [
        ("x", "a", np.zeros(1, dtype=np.uint8), {"s": word})
        for word in ("train", "valid", "validation", "dev")
    ]
    found = rows_by_split(Table(Path("t"), "k", rows, ["a note"]), "s")
    assert [len(table.rows) for table in found.values()] == [1, 3]
    assert [table.notes for table in found.values()] == [["a note"], []]
