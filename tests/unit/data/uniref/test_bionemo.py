"""`prepare uniref` from BioNeMo 2 files: exact content, and every refusal with its row."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.uniref.bionemo import BioNeMoInputs, prepare_bionemo
from esm2mega.errors import UserError
from tests.unit.data.uniref.test_build import clusters_of, ids

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CLUSTERS = [["a1", "a2"], ["b1"]]
PROTEINS = [("b1", "AAC"), ("x", "GGG"), ("a2", "MKT"), ("a1", "mktl")]
VALID = ["v2", "v1"]
VALID_PROTEINS = [("v1", "WW"), ("y", "GG"), ("v2", "MK")]


def write_parquet(path: Path, **columns: object) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=1)
    return path


def write_database(path: Path, rows: Sequence[tuple[object, object]], key: str = "PRIMARY KEY") -> Path:
    database = sqlite3.connect(path)
    with database:
        database.execute(f"CREATE TABLE protein (id TEXT {key}, sequence TEXT)")
        database.executemany("INSERT INTO protein VALUES (?, ?)", rows)
    database.close()
    return path


def write(folder: Path) -> BioNeMoInputs:
    return BioNeMoInputs(
        write_parquet(folder / "train.parquet", ur90_id=CLUSTERS),
        write_database(folder / "train.db", PROTEINS),
        write_parquet(folder / "valid.parquet", ur50_id=VALID),
        write_database(folder / "valid.db", VALID_PROTEINS),
    )


def error_of(inputs: BioNeMoInputs) -> str:
    folder = Path(inputs.train_clusters).parent
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as caught:
        prepare_bionemo(inputs, folder / "out")
    assert sorted(folder.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_stores_are_literally_these(tmp_path: Path) -> None:
    report = prepare_bionemo(write(tmp_path), tmp_path / "out")
    train, valid = TokenStore(tmp_path / "out" / "train"), TokenStore(tmp_path / "out" / "valid")
    train.verify()
    assert ids(train) == ["b1", "a2", "a1"]
    assert train.clusters is not None
    assert train.clusters.offsets.tolist() == [0, 2, 3] and train.clusters.members.tolist() == [2, 1, 0]
    assert clusters_of(train) == {"1": ["a1", "a2"], "2": ["b1"]}
    assert ids(valid) == ["v1", "v2"] and valid.clusters is None
    assert train.manifest["dropped_sequences"] == valid.manifest["dropped_sequences"] == 1
    assert [source["role"] for source in train.manifest["sources"]] == ["clusters", "proteins"]
    assert all(len(source["sha256"]) == 64 for source in train.manifest["sources"])
    assert (report.clusters, report.largest) == (2, 2) and list(report.stores.counts) == ["train", "valid"]


def test_cluster_ids_are_used_where_there_are_some(tmp_path: Path) -> None:
    inputs = write(tmp_path)
    named = write_parquet(tmp_path / "named.parquet", ur90_id=CLUSTERS, ur50_id=["A", "B"])
    prepare_bionemo(inputs._replace(train_clusters=named), tmp_path / "named")
    assert clusters_of(TokenStore(tmp_path / "named" / "train")) == {"A": ["a1", "a2"], "B": ["b1"]}
    overlap = write_parquet(tmp_path / "overlap.parquet", ur90_id=CLUSTERS, ur50_id=["A", "v1"])
    message = error_of(inputs._replace(train_clusters=overlap))
    assert message.startswith("valid.parquet: row 2: 'v1' is held out but also a training cluster in overlap")


Change = Callable[[Path, BioNeMoInputs], BioNeMoInputs]


def clusters(**columns: object) -> Change:
    return lambda folder, inputs: inputs._replace(
        train_clusters=write_parquet(folder / "n.parquet", **columns)
    )


def proteins(*rows: tuple[object, object], key: str = "PRIMARY KEY") -> Change:
    return lambda folder, inputs: inputs._replace(train_database=write_database(folder / "n.db", rows, key))


def valid_ids(*names: object) -> Change:
    return lambda folder, inputs: inputs._replace(
        valid_clusters=write_parquet(folder / "n.parquet", ur50_id=list(names))
    )


def text_file(field: str) -> Change:
    def change(folder: Path, inputs: BioNeMoInputs) -> BioNeMoInputs:
        (folder / "text").write_text("id,sequence\n" * 200)
        return inputs._replace(**{field: folder / "text"})

    return change


BAD: dict[str, tuple[Change, str]] = {
    "missing member": (
        clusters(ur90_id=[["a1"], ["b1", "b7", "b8"]]),
        "n.parquet: row 2: member 'b7' of cluster '2' is not in train.db (2 such ids in all)",
    ),
    "member in two clusters": (
        clusters(ur90_id=[["a1"], ["b1", "a1"]]),
        "n.parquet: row 2: member 'a1' of cluster '2' is in cluster '1' too",
    ),
    "empty cluster": (clusters(ur90_id=[["a1"], []]), "n.parquet: row 2: the cluster has no members"),
    "no list": (clusters(ur90_id=["a1", "b1"]), "n.parquet: row 1: ur90_id is 'a1', not a list of ids"),
    "null cluster": (clusters(ur90_id=[["a1"], None]), "n.parquet: row 2: ur90_id is None, not a list"),
    "null member": (clusters(ur90_id=[["a1", None]]), "n.parquet: row 1: a member in ur90_id is None"),
    "cluster id twice": (
        clusters(ur90_id=CLUSTERS, ur50_id=["A", "A"]),
        "n.parquet: row 2: cluster 'A' is listed before, at n.parquet: row 1",
    ),
    "other column": (clusters(members=CLUSTERS), "n.parquet: no column 'ur90_id' among members"),
    "no clusters": (
        clusters(ur90_id=pyarrow.array([], pyarrow.list_(pyarrow.string()))),
        "n.parquet: has no rows",
    ),
    "no sequence": (proteins(*PROTEINS[:3], ("a1", None)), "n.db: row 4: the sequence of 'a1' is None"),
    "no residue": (proteins(("b1", "M1")), "n.db: row 1: '1' in the sequence of 'b1' is no residue"),
    "no id": (proteins(("b1", "M"), (None, "M")), "n.db: row 2: id is None, not a text"),
    "only unknown": (proteins(("b1", "JJ")), "n.db: row 1: the sequence of 'b1' has only unknown residues"),
    "protein twice": (
        proteins(*PROTEINS, ("a2", "M"), key=""),
        "n.db: row 5: 'a2' occurs earlier, at n.db: row 3",
    ),
    "missing validation id": (
        valid_ids("v1", "v3", "v4"),
        "n.parquet: row 2: 'v3' is not in valid.db",
    ),
    "validation id twice": (
        valid_ids("v1", "v1"),
        "n.parquet: row 2: 'v1' occurs earlier, at n.parquet: row 1",
    ),
    "validation in training": (
        valid_ids("v1", "a2"),
        "n.parquet: row 2: 'a2' is held out but a member of a cluster in train.parquet",
    ),
    "same database": (
        lambda folder, inputs: inputs._replace(valid_database=inputs.train_database),
        "train.db: given both as --train-database-path and as --valid-database-path; what is trained on",
    ),
    "same clusters": (
        lambda folder, inputs: inputs._replace(valid_clusters=inputs.train_clusters),
        "train.parquet: given both as --train-cluster-path and as --valid-cluster-path",
    ),
    "half a validation": (
        lambda folder, inputs: inputs._replace(valid_database=None),
        "validation needs both --valid-cluster-path and --valid-database-path",
    ),
    "no such file": (
        lambda folder, inputs: inputs._replace(train_database=folder / "absent.db"),
        "absent.db: no such SQLite file",
    ),
    "not Parquet": (text_file("train_clusters"), "text: is not a readable Parquet file"),
    "not SQLite": (
        text_file("train_database"),
        "text: cannot be read as SQLite with a table protein(id, sequence)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_row(tmp_path: Path, name: str) -> None:
    change, expected = BAD[name]
    assert error_of(change(tmp_path, write(tmp_path))).startswith(expected)


def test_without_pyarrow_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error_of(inputs).endswith("install it with `pip install 'esm2mega[parquet]'`")
