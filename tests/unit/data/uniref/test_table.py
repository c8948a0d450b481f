"""`prepare uniref` from tables of one row per member, with the rows of a cluster anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.uniref import id_index
from esm2mega.data.uniref import table as uniref_table
from esm2mega.data.uniref.table import prepare_table
from esm2mega.errors import UserError
from tests.unit.data.uniref.test_build import clusters_of, ids

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, rows: list[tuple[object, object, object]]) -> Path:
    columns = dict(zip(("ur50_id", "ur90_id", "sequence"), map(list, zip(*rows, strict=True)), strict=True))
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_the_stores_are_literally_these(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0.parquet", [("B", "b1", "AAC"), ("A", "a1", "MKTL")])
    write(tmp_path / "train" / "1.parquet", [("B", "b2", "AAM"), ("C", "c1", "W"), ("A", "a2", "MK")])
    valid = write(tmp_path / "valid.parquet", [("D", "d9", "MDM"), ("E", "e9", "MEM")])
    report = prepare_table(tmp_path / "train", tmp_path / "out", valid)
    train = TokenStore(tmp_path / "out" / "train")
    train.verify()
    assert ids(train) == ["b1", "a1", "b2", "c1", "a2"]
    assert train.clusters is not None
    assert train.clusters.offsets.tolist() == [0, 2, 4, 5]
    assert train.clusters.members.tolist() == [0, 2, 1, 4, 3]
    assert clusters_of(train) == {"B": ["b1", "b2"], "A": ["a1", "a2"], "C": ["c1"]}
    assert ids(TokenStore(tmp_path / "out" / "valid")) == ["D", "E"]
    assert (report.clusters, report.largest) == (3, 2)
    assert [source["name"] for source in train.manifest["sources"]] == ["0.parquet", "1.parquet"]


def test_grouping_does_not_depend_on_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = [(f"c{c}", f"m{i}", "MK") for i, c in enumerate(rng.geometric(0.05, 500).tolist())]
    table = write(tmp_path / "t.parquet", rows)
    monkeypatch.setattr(uniref_table, "_BLOCK", 7)
    monkeypatch.setattr(id_index, "_BLOCK", 11)
    prepare_table(table, tmp_path / "out")
    expected: dict[str, list[str]] = {}
    for cluster, member, _ in rows:
        expected.setdefault(cluster, []).append(member)
    assert list(clusters_of(TokenStore(tmp_path / "out" / "train")).items()) == list(expected.items())


GOOD = [("A", "a1", "MK"), ("B", "b1", "MK")]
HELD_OUT = [("D", "d1", "MK")]


@pytest.mark.parametrize(
    ("train", "valid", "expected"),
    [
        (
            [*GOOD, ("C", "a1", "MK")],
            HELD_OUT,
            "t.parquet: row 3: 'a1' occurs earlier, at t.parq",
        ),
        (
            GOOD,
            [*HELD_OUT, ("B", "b9", "M")],
            "v.parquet: row 2: 'B' is held out but also a",
        ),
        (
            GOOD,
            [*HELD_OUT, ("D", "d2", "M")],
            "v.parquet: row 2: 'D' occurs earlier, at v.parq",
        ),
        ([*GOOD, ("C", "c1", "M2")], HELD_OUT, "t.parquet: row 3: '2' in the sequence of 'c1' is no residue"),
        ([*GOOD, (None, "c1", "M")], HELD_OUT, "t.parquet: row 3: ur50_id is None, not a text"),
        ([*GOOD, ("C", "c1", "JJ")], HELD_OUT, "t.parquet: row 3: the sequence of 'c1' has only unknown"),
    ],
)
def test_refusals_name_the_row(
    tmp_path: Path,
    train: list[tuple[object, object, object]],
    valid: list[tuple[object, object, object]],
    expected: str,
) -> None:
    files = [write(tmp_path / "t.parquet", train), write(tmp_path / "v.parquet", valid)]
    with pytest.raises(UserError) as caught:
        prepare_table(files[0], tmp_path / "out", files[1])
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(expected)
    assert sorted(tmp_path.iterdir()) == files


def test_the_same_table_twice_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "t.parquet", GOOD)
    with pytest.raises(UserError, match="given both as --table and as --valid-table"):
        prepare_table(table, tmp_path / "out", table)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no \*\.parquet files"):
        prepare_table(tmp_path / "empty", tmp_path / "out")
