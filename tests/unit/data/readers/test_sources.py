"""Which reader an input gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.sources import FORMATS, format_of, open_source
from esm2mega.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.fasta", "fasta"),
        ("a.fa.gz", "fasta"),
        ("proteins", "fasta"),
        ("uniprot_sprot.dat.v2", "fasta"),
        ("a.CSV", "csv"),
        ("a.tsv.zst", "csv"),
        ("a.b.jsonl.gz", "jsonl"),
        ("a.json", "jsonl"),
        ("a.parquet", "parquet"),
        ("pfam_text_document.idx", "megatron"),
        ("pfam_text_document.bin", "megatron"),
        ("pfam_train.lmdb", "tape"),
    ],
)
def test_the_ending_decides(name: str, expected: str) -> None:
    assert format_of(Path(name)) == expected
    assert expected in FORMATS


def test_a_directory_with_a_data_base_is_of_tape(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"")
    assert format_of(tmp_path) == "tape"


def test_a_named_format_wins_and_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(">a\nMK\n")
    assert [record.id for record in open_source(path, SourceOptions(format="fasta"))] == ["a"]
    with pytest.raises(UserError, match=r"--format fata is not one of fasta, csv, .*; did you mean fasta\?"):
        open_source(path, SourceOptions(format="fata"))


@pytest.mark.parametrize("name", ["fasta", "csv", "jsonl", "parquet"])
def test_missing_files_and_directories(tmp_path: Path, name: str) -> None:
    options = SourceOptions(format=name)
    with pytest.raises(UserError, match="absent: no such .* file"):
        open_source(tmp_path / "absent", options)
    with pytest.raises(UserError, match="is a directory, not a"):
        open_source(tmp_path, options)
