"""Beside predictions stand their ranks and columns of the input, where that is asked for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from esm2mega.cli.app import main
from esm2mega.finetune.api import train_model
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(7)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(5, 40, 40)]
ROWS = [(f"p{number}", s, number / 4, f"a, {number}") for number, s in enumerate([*SEQUENCES, SEQUENCES[0]])]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    settings = [*SETTINGS, f"run_dir={run_dir}", "train.max_steps=2", "task.kind=regression"]
    train_model(settings, train=[(s, len(s)) for s in SEQUENCES[:10]])
    return run_dir


def table(path: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "sequence", "target", "my note"), *ROWS])
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ranks_and_columns_of_the_input(run: Path, tmp_path: Path) -> None:
    source, out = table(tmp_path / "t.csv"), tmp_path / "out.csv"
    words = ["predict", str(run), str(source), "--out", str(out), "--rank", "--keep-columns"]
    assert main([*words, "all"]) == 0
    found = rows(out)
    assert list(found[0]) == ["id", "truncated", "target", "rank", "sequence", "input_target", "my note"]
    kept = [(row["id"], row["sequence"], float(row["input_target"]), row["my note"]) for row in found]
    assert kept == ROWS
    values = np.array([float(row["target"]) for row in found])
    assert [int(row["rank"]) for row in found] == rankdata(-values, method="min").tolist()
    assert found[0]["rank"] == found[-1]["rank"]  # the same protein
    lowest = tmp_path / "lowest.csv"
    assert main(["predict", str(run), str(source), "--out", str(lowest), "--rank-lowest"]) == 0
    assert [int(row["rank"]) for row in rows(lowest)] == rankdata(values, method="min").tolist()
    # A later start knows them.
    assert main([*words, "all", "--resume"]) == 0
    assert main([*words, "my note", "--resume"]) == 2


def test_parquet_keeps_them_over_groups_of_rows(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    monkeypatch.setattr("esm2mega.infer.exports._GROUP_RESIDUES", 100)
    source, out = table(tmp_path / "t.csv"), tmp_path / "out.parquet"
    assert main(["predict", str(run), str(source), "--out", str(out), "--rank", "--keep-columns", "all"]) == 0
    assert parquet.ParquetFile(out).num_row_groups > 3
    found = parquet.read_table(out).to_pydict()
    assert found["my note"] == [row[3] for row in ROWS] and sorted(found["rank"])[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--keep-columns", "absent"],
            "t.csv has no other column of this name; it has sequence, target, my n",
        ),
        (["--keep-columns", "all", "FASTA"], "f.fasta is no table and has no columns; leave the option out"),
        (["--keep-columns", "all", "H5"], "columns are kept in tables; give --out"),
        (["--rank", "H5"], "--rank: ranks are written to tables; give --out"),
        (["--rank-lowest", "H5"], "--rank-lowest: ranks are written to tables; give --out"),
    ],
)
def test_what_cannot_stand_there(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = table(tmp_path / "t.csv"), tmp_path / ("out.h5" if words[-1] == "H5" else "out.csv")
    if words[-1] == "FASTA":
        source = tmp_path / "f.fasta"
        source.write_text(">a\nMKT\n")
    options = [word for word in words if word not in ("H5", "FASTA")]
    assert main(["predict", str(run), str(source), "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
