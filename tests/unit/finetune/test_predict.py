"""`predict` in one process: inputs, order, how much it holds at once, resuming, refusals."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.finetune.api import infer_model, train_model
from esm2mega.finetune.draws import Uncertainty
from esm2mega.finetune.predict import predict
from esm2mega.infer.arrays import ArrayFile
from esm2mega.infer.embed import EmbedRequest, embed
from tests.infer_models import random_proteins, write_fasta
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
h5py = pytest.importorskip("h5py")

SEQUENCES = random_proteins(np.random.default_rng(6).integers(1, 62, 300).tolist())
PROTEINS = [(f"p{number % 50}", sequence) for number, sequence in enumerate(SEQUENCES)]
"""Ids repeat."""


def states_of(sequence: str) -> str:
    return "".join("HEC"[ord(letter) % 3] for letter in sequence)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of residues."""
    pairs = [(sequence, states_of(sequence)) for sequence in SEQUENCES[:30]]
    run_dir = tmp_path_factory.mktemp("run")
    task = ("task.kind=token_classification", "train.max_steps=2", f"run_dir={run_dir}")
    return train_model([*SETTINGS, *task], train=pairs).checkpoint


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("fasta") / "proteins.fasta", PROTEINS)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "x.h5"
    predict(checkpoint, fasta, out)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_compressed_files_and_stores_are_inputs_too(
    checkpoint: Path, fasta: Path, whole: Path, tmp_path: Path
) -> None:
    """The bytes are the same, and what they say is what `infer_model` says of the sequences."""
    table = tmp_path / "t.csv.gz"
    lines = [f"{name},{sequence}\n" for name, sequence in PROTEINS]
    table.write_bytes(gzip.compress(("name,residues\n" + "".join(lines)).encode()))
    prepare_fasta([str(fasta)], tmp_path / "store")
    columns = ["data.sequence_column=residues", "data.id_column=name"]
    for path in (table, tmp_path / "store" / "train"):
        predict(checkpoint, path, tmp_path / f"{path.name}.h5", columns)
        assert (tmp_path / f"{path.name}.h5").read_bytes() == whole.read_bytes()
    predict(checkpoint, fasta, tmp_path / "x.csv")
    rows = rows_of(tmp_path / "x.csv")
    assert [row["id"] for row in rows] == [name for name, _ in PROTEINS]
    assert [row["prediction"] for row in rows] == infer_model(checkpoint, SEQUENCES)
    assert {row["truncated"] for row in rows} == {"False"}


def test_predict_holds_a_few_packs_at_once(
    checkpoint: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proteins that were read and whose predictions are not written yet: some packs of 128 tokens, which is
    what passes through the model together, and never the 300 of the table.
    """
    read, write = TokenStore.residues, ArrayFile.write
    waiting: set[int] = set()
    most, seen = 0, 0

    def reads(store: TokenStore, row: int) -> Any:
        nonlocal most, seen
        waiting.add(row)
        most, seen = max(most, len(waiting)), seen + 1
        return read(store, row)

    def writes(arrays: ArrayFile, name: str, row: int, rows: Any) -> None:
        write(arrays, name, row, rows)
        waiting.discard(int(np.searchsorted(offsets, row)))

    offsets = np.cumsum([0, *map(len, SEQUENCES)])
    monkeypatch.setattr(TokenStore, "residues", reads)
    monkeypatch.setattr(ArrayFile, "write", writes)
    predict(checkpoint, fasta, tmp_path / "x.h5")
    assert seen == len(SEQUENCES) and not waiting
    # The packs of a piece: a 64th of some 80.
    assert most < 20


def test_a_protein_of_unknown_residues_has_a_prediction(checkpoint: Path, tmp_path: Path) -> None:
    """That of `infer_model`; `embed` and training refuse it."""
    sequences = ["JJJJ", "MKTAY"]
    fasta = write_fasta(tmp_path / "x.fasta", [("a", sequences[0]), ("b", sequences[1])])
    predict(checkpoint, fasta, tmp_path / "x.csv")
    rows = rows_of(tmp_path / "x.csv")
    assert [row["id"] for row in rows] == ["a", "b"]
    assert [row["prediction"] for row in rows] == infer_model(checkpoint, sequences)
    with pytest.raises(UserError, match="the sequence of 'a' has only unknown residues"):
        embed(EmbedRequest(str(checkpoint), str(fasta), str(tmp_path / "e.h5")))


class Stop(Exception):
    pass


def stop_behind(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Break the next start off when it has done so many pieces."""
    from esm2mega.infer import job as module

    compute = module._compute

    def stops(job: Any, work: Any, ranks: Any, remaining: Sequence[int]) -> None:
        assert len(remaining) > pieces
        compute(job, work, ranks, remaining[:pieces])
        monkeypatch.setattr(module, "_compute", compute)
        raise Stop

    monkeypatch.setattr(module, "_compute", stops)


@pytest.mark.parametrize("name", ["x.h5", "x.csv", pytest.param("x.parquet", marks=pytest.mark.slow)])
def test_resume_goes_on_and_gives_the_same_bytes(
    checkpoint: Path, fasta: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "x.parquet":
        pytest.importorskip("pyarrow")
    out, expected = tmp_path / name, tmp_path / f"whole.{name}"
    how = Uncertainty("dropout", 2) if name == "x.parquet" else None
    predict(checkpoint, fasta, expected, uncertainty=how)
    stop_behind(monkeypatch, 20)
    with pytest.raises(Stop):
        predict(checkpoint, fasta, out, uncertainty=how)
    assert not out.exists()
    with pytest.raises(UserError, match="unfinished output of an earlier start; continue with --resume"):
        predict(checkpoint, fasta, out)
    other = ["infer.max_seq_length=70"]
    with pytest.raises(UserError, match="begun with other settings: max_seq_length was 64 and is 70"):
        predict(checkpoint, fasta, out, other, mode="resume", uncertainty=how)
    if how is not None:
        with pytest.raises(UserError, match="begun with other settings: num_draws was 2 and is 3"):
            predict(checkpoint, fasta, out, mode="resume", uncertainty=Uncertainty("dropout", 3))
    predict(checkpoint, fasta, out, mode="resume", uncertainty=how)
    assert out.read_bytes() == expected.read_bytes()
    assert not (tmp_path / f"{name}.partial").exists()
    with pytest.raises(UserError, match="exists; replace it with --overwrite"):
        predict(checkpoint, fasta, out)
    assert predict(checkpoint, fasta, out, mode="resume", uncertainty=how) == [f"{out} is complete"]
    with pytest.raises(UserError, match="exists and is of other settings: max_seq_length was 64"):
        predict(checkpoint, fasta, out, other, mode="resume", uncertainty=how)
    assert out.read_bytes() == expected.read_bytes()


def test_a_csv_whose_settings_are_not_known_is_not_complete(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are noted beside it, of this very content."""
    fasta, out = write_fasta(tmp_path / "x.fasta", PROTEINS[:3]), tmp_path / "x.csv"
    command = ["predict", str(checkpoint), str(fasta), "--out", str(out), "--resume"]
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.csv.settings.json", "x.fasta"]
    assert main(command) == 0
    assert f"{out} is complete" in capsys.readouterr().out
    content, noted = out.read_bytes(), tmp_path / "x.csv.settings.json"
    settings = noted.read_text()
    for text in ("[]", "{}", "no JSON", '{"sha256": "0", "attributes": {}}', None):
        noted.unlink() if text is None else noted.write_text(text)
        assert main(command) == 2
        assert "does not record its settings" in capsys.readouterr().err
    noted.write_text(settings)
    out.write_bytes(content + b"p9,False,H\n")
    assert main(command) == 2
    assert "does not record its settings" in capsys.readouterr().err
    assert main([*command[:-1], "--overwrite"]) == 0
    assert out.read_bytes() == content and noted.read_text() == settings


def test_long_proteins_are_as_in_training_unless_said_otherwise(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cropped at random as in an evaluation, or cut into chunks, of which nothing is missing."""
    sequences = random_proteins([20, 100, 62], seed=9)
    fasta = write_fasta(tmp_path / "long.fasta", [(f"p{i}", s) for i, s in enumerate(sequences)])
    command = ["predict", str(checkpoint), str(fasta), "--out"]
    assert main([*command, str(tmp_path / "x.csv")]) == 2
    message = r"'p1' \(number 2\) has 100 residues, more than the 62 .*; set --too-long crop, or raise"
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["long.fasta"]
    assert main([*command, str(tmp_path / "x.csv"), "--too-long", "crop"]) == 0
    assert "1 of 3 proteins of" in (said := capsys.readouterr().out)
    assert "have more than 62 residues and are cropped (random)" in said
    rows = rows_of(tmp_path / "x.csv")
    assert [row["truncated"] for row in rows] == ["False", "True", "False"]
    found = infer_model(checkpoint, sequences, ["data.too_long=crop"])
    assert [row["prediction"] for row in rows] == found
    assert 36 <= found[1].count("-") <= 40
    chunked = [str(tmp_path / "y.csv"), "--too-long", "crop", "data.crop=chunk"]
    assert main([*command, *chunked]) == 0
    found = infer_model(checkpoint, sequences, ["data.too_long=crop", "data.crop=chunk"])
    assert [row["prediction"] for row in rows_of(tmp_path / "y.csv")] == found
    assert "-" not in found[1] and len(found[1]) == 100
    assert main([*command, str(tmp_path / "z.csv"), "--max-seq-length", "102"]) == 0
    assert {row["truncated"] for row in rows_of(tmp_path / "z.csv")} == {"False"}


@pytest.mark.parametrize(
    "written", [["--too-long", "chunk"], ["infer.too_long=chunk"], ["--too-long", "drop"]]
)
def test_what_only_others_do_with_long_proteins_is_refused_by_its_name(
    checkpoint: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], written: list[str]
) -> None:
    command = ["predict", str(checkpoint), str(fasta), "--out", str(tmp_path / "x.csv"), *written]
    assert main(command) == 2
    value = written[-1].removeprefix("infer.too_long=")
    message = f"infer.too_long={value} (--too-long) is not one of error, crop, which `predict` takes"
    assert message in (said := capsys.readouterr().err)
    assert "data.too_long" not in said
    assert not list(tmp_path.iterdir())


def test_resume_and_overwrite_exclude_each_other(
    checkpoint: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.csv"
    command = ["predict", str(checkpoint), str(fasta), "--out", str(out), "--resume", "--overwrite"]
    assert main(command) == 2
    assert "--resume and --overwrite exclude each other; give one of them" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown ending '.npz'"):
        predict(checkpoint, fasta, tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())
