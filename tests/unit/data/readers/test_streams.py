"""Streams are read as the files that they would be."""

from __future__ import annotations

import gzip
import os
import sys
import threading
from pathlib import Path

import pytest

from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.sources import open_source
from esm2mega.data.readers.streams import spooled
from esm2mega.errors import UserError
from tests.pipes import pipe, standard_input

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

EXPECTED = [("a", b"MKT"), ("b", b"LLV")]
FASTA = b">a\nMKT\n>b\nLLV\n"
CSV = b"id,sequence\na,MKT\nb,LLV\n"
CONTENT = {
    "fasta": FASTA,
    "csv": CSV,
    "tsv": CSV.replace(b",", b"\t"),
    "jsonl": b'\n{"id": "a", "sequence": "MKT"}\n{"id": "b", "sequence": "LLV"}\n',
    "marked": b"\xef\xbb\xbf" + CSV,
}


def records(path: Path) -> list[tuple[str, bytes]]:
    return [(record.id, record.residues) for record in open_source(path, SourceOptions())]


@pytest.mark.parametrize("packed", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("kind", CONTENT)
def test_the_content_says_the_format(kind: str, packed: str) -> None:
    pack = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd.compress}[packed]
    with pipe(pack(CONTENT[kind])) as path, spooled([path]) as files:
        assert records(files.paths[0]) == EXPECTED
        assert records(files.paths[0]) == EXPECTED, "it can be read again"


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install esm2mega[parquet]")
    import pyarrow.parquet

    table = pyarrow.table({"id": ["a", "b"], "sequence": ["MKT", "LLV"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pipe((tmp_path / "t.parquet").read_bytes()) as path, spooled([path]) as files:
        assert records(files.paths[0]) == EXPECTED


def test_a_table_of_one_column_is_known_by_its_name() -> None:
    with pipe(b"aa\nMKT\nLLV\n") as path, spooled([path], "aa") as files:
        options = SourceOptions(sequence_column="aa")
        assert [record.residues for record in open_source(files.paths[0], options)] == [b"MKT", b"LLV"]


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input(name: str) -> None:
    with standard_input(FASTA), spooled([name]) as files:
        assert files.paths[0].name == "stdin.fasta"
        assert records(files.paths[0]) == EXPECTED
    assert not files.paths[0].parent.exists(), "nothing is left behind"


def test_standard_input_from_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(CSV)
    with open(tmp_path / "t", "rb") as file, spooled([f"/dev/fd/{file.fileno()}"]) as files:
        assert records(files.paths[0]) == EXPECTED


def test_a_named_pipe_keeps_the_ending_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.csv.gz"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(gzip.compress(CSV),))
    writer.start()
    with spooled([path]) as files:
        writer.join()
        assert files.paths[0].name == "x.csv.gz" and records(files.paths[0]) == EXPECTED


def test_messages_name_the_stream(tmp_path: Path) -> None:
    expected = pytest.raises(UserError, match=r"^-:4: '1' in the sequence of 'b'")
    with expected, standard_input(b">a\nMKT\n>b\nL1V\n"), spooled(["-"]) as files:
        list(open_source(files.paths[0], SourceOptions()))
    assert files.shown(f"{files.paths[0]}: has no 'id'") == "-: has no 'id'"
    # A file is taken as it is, and so is an error about it.
    (tmp_path / "x.fasta").write_bytes(b">a\n1\n")
    with pytest.raises(UserError, match=r"x.fasta:2: '1'"), spooled([tmp_path / "x.fasta"]) as files:
        assert files.paths == [tmp_path / "x.fasta"]
        list(open_source(files.paths[0], SourceOptions()))


def test_torchrun_hands_no_process_substitution_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the user's pipe is that of something else in its processes."""
    monkeypatch.setenv("RANK", "0")
    closed = pytest.raises(UserError, match=r"torchrun hands no process .*give - as its name")
    with pipe(FASTA) as path, closed, spooled([path]):
        pass
    with standard_input(FASTA), spooled(["/dev/fd/0"]) as files:
        assert records(files.paths[0]) == EXPECTED


def test_what_is_not_there_or_says_nothing() -> None:
    closed = pytest.raises(UserError, match="/dev/fd/987: is not open in this process; torchrun hands no")
    with closed, spooled(["/dev/fd/987"]):
        pass
    empty = pytest.raises(UserError, match="^-: no sequences in the file")
    with empty, standard_input(b""), spooled(["-"]) as files:
        list(open_source(files.paths[0], SourceOptions()))
