"""`prepare fasta --refined`: pieces of long proteins, as ESM2-FA wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
from esm2mega.data.store.refined import LONGEST_PIECE, RefinedFasta
from esm2mega.errors import UserError


def residues(count: int) -> str:
    return ("LAGVSERTIDPKQNFYMHWC" * (count // 20 + 1))[:count]


def test_the_published_example(tmp_path: Path) -> None:
    """2050 residues in pieces of at most 1024: 684, 683 and 683; the last id says `end`."""
    whole = residues(2050)
    text = f">long  its words\tkept\n{whole[:900]}\n{whole[900:]}\n>short x\nmkjl\n>exact\n{residues(1024)}\n"
    (tmp_path / "x.fasta").write_text(text)
    options = PrepareOptions(refined=RefinedFasta(tmp_path / "r" / "x_refined.fasta", 1024))
    report = prepare_fasta([tmp_path / "x.fasta"], tmp_path / "out", options=options)
    path = tmp_path / "r" / "x_refined.fasta"
    assert path.read_text().splitlines() == [
        ">long/1-684  its words\tkept", whole[:684],
        ">long/685-1367  its words\tkept", whole[684:1367],
        ">long/1368-end  its words\tkept", whole[1367:],
        ">short x", "mkjl", ">exact", residues(1024),
    ]  # fmt: skip
    assert f"{path}: 5 pieces of 3 sequences, of at most 1,024 residues" in report.lines()
    assert report.counts["train"].sequences == 3


def test_any_input_in_order_and_empty_rows_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("id,sequence\nc1,LAGLAG\nc2,\n")
    (tmp_path / "b.fasta").write_text(">f1 words\nVSERT\n")
    command = ["prepare", "fasta", str(tmp_path / "a.csv"), str(tmp_path / "b.fasta"), "--drop-empty"]
    command += ["--out", str(tmp_path / "out"), "--refined", str(tmp_path / "r.fasta"), "--max-length", "4"]
    assert main(command) == 0
    assert "4 pieces of 2 sequences, of at most 4 residues" in capsys.readouterr().out
    assert (tmp_path / "r.fasta").read_text().split() == [
        *(">c1/1-3", "LAG", ">c1/4-end", "LAG"),
        *(">f1/1-3", "words", "VSE", ">f1/4-end", "words", "RT"),
    ]
    # Pieces that are read again are cut no more.
    assert [len(record.residues) for record in FastaReader(tmp_path / "r.fasta")] == [3, 3, 3, 2]


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.fasta").write_text(">a\nLAG\n")
    command = ["prepare", "fasta", str(tmp_path / "x.fasta"), "--out", str(tmp_path / "out")]
    assert main([*command, "--max-length", "5"]) == 2
    assert "--max-length 5 is for the pieces of --refined; give --refined too" in capsys.readouterr().err
    assert main([*command, "--refined", str(tmp_path / "x.fasta")]) == 2
    assert "exists already; move it away, or give another --refined" in capsys.readouterr().err
    assert main([*command, "--refined", str(tmp_path / "r.fasta"), "--max-length", "0"]) == 2
    assert "--max-length=0 is too small" in capsys.readouterr().err
    assert main([*command, "--refined", str(tmp_path / "r.fasta.gz")]) == 2
    assert "r.fasta.gz: is written without compression; name it r.fasta" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*command, "--refined", str(tmp_path / "file" / "r.fasta")]) == 1
    assert "choose another --refined" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "x.fasta").read_text() == ">a\nLAG\n"


def test_a_bad_record_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(">a\nLAG\n>b\nL1G\n")
    options = PrepareOptions(refined=RefinedFasta(tmp_path / "r.fasta"))
    with pytest.raises(UserError, match="no residue"):
        prepare_fasta([tmp_path / "x.fasta"], tmp_path / "out", options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["x.fasta"]


def test_the_default_is_that_of_training() -> None:
    assert DataConfig().max_seq_length - 2 == LONGEST_PIECE
