"""`examples/migrate/bionemo2.sh` on small data in the layouts that BioNeMo 2 has."""

from __future__ import annotations

import csv
import sqlite3
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from esm2mega.data.store.token_store import TokenStore
from tests import foreign
from tests.cli.scripts import SMALL, random_sequences, records, run, warm_python

for package in ("esm", "sklearn", "pyarrow"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install esm2mega[dev]")


def write_uniref(folder: Path) -> None:
    """Eight clusters of two members and two representatives for validation, in Parquet and SQLite."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    found = random_sequences(18, seed=1)
    members = [[f"UniRef90_{n}a", f"UniRef90_{n}b"] for n in range(8)]
    held_out = ["UniRef50_v0", "UniRef50_v1"]
    parquet.write_table(pyarrow.table({"ur90_id": members}), folder / "train_clusters.parquet")
    parquet.write_table(pyarrow.table({"ur50_id": held_out}), folder / "valid_clusters.parquet")
    rows = {
        "train": list(zip(sum(members, []), found[:16], strict=True)),
        "validation": list(zip(held_out, found[16:], strict=True)),
    }
    for name, content in rows.items():
        with sqlite3.connect(folder / f"{name}.db") as database:
            database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
            database.executemany("INSERT INTO protein VALUES (?, ?)", content)


def write_table(path: Path, sequences: list[str]) -> Path:
    """The columns of their fine-tuning, and the values of their tutorial."""
    path.write_text("sequences,labels\n" + "".join(f"{text},{len(text) / 100}\n" for text in sequences))
    return path


def test_the_published_sequence_of_commands(tmp_path: Path) -> None:
    write_uniref(tmp_path / "uniref")
    mine = random_sequences(20, seed=2)
    write_table(tmp_path / "train.csv", mine[:10])
    write_table(tmp_path / "valid.csv", mine[10:14])
    write_table(tmp_path / "new.csv", mine[14:])
    foreign.write_nemo2(foreign.truth(torch.float32, tanh=True), tmp_path)
    few = ("model.layer_spec=local", *SMALL)
    variables = {
        "CHECKPOINT": "nemo2", "PROTEINS": "new.csv", "OUT": "out", "CONFIG": "base", "STEPS": "2",
        "NPROC": "1", "FINETUNE": " ".join(few), "PROTEIN": "MKTAY",
    }  # fmt: skip
    overrides = [f"model.{key}={value}" for key, value in foreign.SHAPE.items()]
    with warm_python(tmp_path):
        done = run("migrate/bionemo2.sh", *overrides, *few, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"

    store = TokenStore(out / "uniref" / "train")
    assert store.clusters is not None and len(store) == 16
    for name in ("pretrained", "continued", "frozen", "lora"):
        assert [r["step"] for r in records(out / name) if r["kind"] == "train"] == [2], name
    with h5py.File(out / "proteins.h5") as file:
        assert file[f"pooled/layer_{foreign.L}"].shape == (6, foreign.H)
        assert len(file["logits"]) == sum(map(len, mine[14:]))
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    # In the order of the input, with the adapters.
    assert len(rows) == 6 and np.std([float(row["labels"]) for row in rows]) > 0
    assert done.stdout.count("validation loss") == 2 and (out / "tutorial" / "length_lora").is_dir()
    with (out / "scan.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5 * 19
    assert (out / "hf" / "config.json").is_file()
    assert sorted(path.name for path in (out / "nemo2").iterdir()) == ["context", "weights"]
