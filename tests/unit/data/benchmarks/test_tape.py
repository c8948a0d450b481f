"""TAPE's labelled records to tables: numbers as pickled, contacts as TAPE's own code finds them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.benchmarks.names import TAPE_TASKS
from esm2mega.data.benchmarks.tape import prepare_tape
from esm2mega.data.benchmarks.tape_arrays import load_with_arrays, numbers_of
from esm2mega.data.labels.contacts import pair_labels
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.data.labels.schema import IGNORED
from esm2mega.errors import UserError
from esm2mega.pairs import pairs_of

RNG = np.random.default_rng(2)


def write(folder: Path, name: str, rows: list[dict[str, Any]], protocol: int = 4) -> None:
    environment = lmdb.open(str(folder / f"{name}.lmdb"), map_size=1 << 22)
    with environment, environment.begin(write=True) as transaction:
        for number, row in enumerate(rows):
            transaction.put(str(number).encode(), pickle.dumps(row, protocol=protocol))
        transaction.put(b"num_examples", pickle.dumps(len(rows)))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_those_that_were_pickled(protocol: int) -> None:
    arrays = [
        np.array([1.5, -2.25e-7], np.float32),
        RNG.normal(size=(4, 3)),
        np.asfortranarray(RNG.normal(size=(4, 3))),
        np.array([True, False]),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.float64(3.25),
        np.int16(-7),
        np.array(2.5, np.float32),
    ]
    found = load_with_arrays(pickle.dumps(arrays, protocol=protocol))
    for array, loaded in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(numbers_of(loaded), array)
        assert numbers_of(loaded).dtype == np.asarray(array).dtype
    others = [
        np.array(["a"]),
        np.array([{}], dtype=object),
        np.array(["2020-01-01"], dtype="M8[D]"),
        "x",
        None,
    ]
    for loaded in load_with_arrays(pickle.dumps(others, protocol=protocol)):
        assert numbers_of(loaded) is None


def test_what_a_crafted_pickle_asks_for_is_refused() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    with pytest.raises(ValueError, match="print, which is refused"):
        load_with_arrays(pickle.dumps(Evil()))
    # Shapes and bytes that do not agree make no array.
    text = pickle.dumps(np.arange(4, dtype=np.int32), protocol=2).replace(b"K\x04\x85", b"K\x09\x85")
    assert numbers_of(load_with_arrays(text)) is None


def test_contacts_are_those_that_tape_finds(tmp_path: Path) -> None:
    datasets = pytest.importorskip("tape.datasets", reason="tape-proteins is not installed")
    (tmp_path / "proteinnet").mkdir()
    rows = []
    for number, length in enumerate((30, 12, 45)):
        atoms = np.cumsum(RNG.normal(size=(length, 3)) * 2.2, axis=0).astype(np.float32)
        mask = RNG.random(length) < 0.8
        letters = "".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), length))
        rows.append({"id": f"p{number}", "primary": letters, "tertiary": atoms, "valid_mask": mask})
    for split in ("train", "valid"):
        write(tmp_path / "proteinnet", f"proteinnet_{split}", rows)
    lines = prepare_tape("contact_prediction", tmp_path, tmp_path / "out")
    assert "no files of the splits test" in lines[-1]
    task = TaskConfig(kind="contact", mask_column="mask")
    proteins, _ = read_labelled(tmp_path / "out/train.csv", task, DataConfig(), None, "data.train")
    assert proteins.ids == ["p0", "p1", "p2"]
    theirs = datasets.ProteinnetDataset(str(tmp_path), "train")
    for number, row in enumerate(rows):
        _, _, contacts, _ = theirs[number]
        mine = pair_labels(proteins.labels[proteins.offsets[number] : proteins.offsets[number + 1]], IGNORED)
        expected = contacts[pairs_of(len(row["primary"]))]
        np.testing.assert_array_equal(np.where(mine == IGNORED, -1, mine), expected)
        assert (mine == 1).any()


@pytest.mark.parametrize(
    ("name", "value", "cell", "column"),
    [
        ("fluorescence", np.array([3.823163], np.float32), "3.823163", "regression"),
        ("stability", np.array([-1.25e-05], np.float32), "-1.25e-05", "regression"),
        ("stability", [0.5], "0.5", "regression"),
        ("remote_homology", 1194, "1194", "classification"),
        ("secondary_structure", np.array([0, 2, 1], np.int64), "021", "token_classification"),
        ("secondary_structure_8", np.array([7, 0, 3], np.int64), "703", "token_classification"),
    ],
)
def test_labels_of_the_other_tasks(tmp_path: Path, name: str, value: Any, cell: str, column: str) -> None:
    task = TAPE_TASKS[name]
    assert task.kind == column
    row = {"primary": "MKT", task.field: value, "id": b"NA"}
    if task.masked:
        row["valid_mask"] = np.array([True, False, True])
    for split in task.splits:
        write(tmp_path, f"{task.folder}_{split}", [row])
    assert main(["prepare", "tape", name, "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    for split in task.splits:
        header, mask = ("id,sequence,target,mask", ",101") if task.masked else ("id,sequence,target", "")
        assert (tmp_path / "out" / f"{split}.csv").read_text() == f"{header}\nNA,MKT,{cell}{mask}\n"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert list(manifest["splits"]) == list(task.splits) and manifest["notes"] == []


def test_structures_without_a_mask(tmp_path: Path) -> None:
    """No mask at all is a table without one; a mask that some records lack is no complete file."""
    rows = [{"primary": "MKT", "ss8": np.array([7, 0, 3]), "id": f"p{number}"} for number in range(2)]
    write(tmp_path, "secondary_structure_train", rows)
    lines = prepare_tape("secondary_structure_8", tmp_path, tmp_path / "out")
    assert (tmp_path / "out/train.csv").read_text().splitlines()[0] == "id,sequence,target"
    assert "no record has a 'valid_mask', so the tables have no column 'mask'" in lines[-1]
    rows[0]["valid_mask"] = np.ones(3, bool)
    write(tmp_path, "secondary_structure_train", rows)
    with pytest.raises(UserError, match="1 records have no 'valid_mask', first 'p1', and others have one"):
        prepare_tape("secondary_structure_8", tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("stability", {}, "has no numbers 'stability_score'"),
        ("secondary_structure", {"ss3": np.zeros(2, int)}, r"'ss3' has the shape \[2\] for 3 residues"),
        ("secondary_structure", {"ss3": np.array([0, -1, 0])}, "'ss3' is -1 at residue 1; a class is 0 to 9"),
        ("secondary_structure", {"ss3": np.array([0, 2, 10])}, "'ss3' is 10 at residue 2"),
        ("secondary_structure", {"ss3": np.array([0.5, 2, 1])}, "'ss3' is 0.5 at residue 0"),
        ("remote_homology", {"fold_label": 7.5}, "'fold_label' is 7.5; a class is a whole number"),
        ("remote_homology", {"fold_label": float("inf")}, "'fold_label' is inf; a class is a whole number"),
        ("stability", {"stability_score": [float("nan")]}, "'stability_score' is nan, not a number"),
        ("fluorescence", {"log_fluorescence": np.array([np.inf], "f4")}, "'log_fluorescence' is inf"),
        ("stability", {"stability_score": [1.0, 2.0]}, r"'stability_score' has the shape \[2\]"),
        ("contact_prediction", {"tertiary": np.zeros((3, 3))}, "has no 'valid_mask' of 3 residues"),
    ],
)
def test_records_of_something_else(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="name the directory with TAPE's files"):
        prepare_tape(name, tmp_path, tmp_path / "out")
    write(tmp_path, f"{TAPE_TASKS[name].folder}_train", [{"primary": "MKT", **row}])
    with pytest.raises(UserError, match=rf"_train.lmdb: record 0: {message}"):
        prepare_tape(name, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
