"""CSV and JSON lines: what other programs write is read, everything doubtful is one line with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esm2mega.data.readers import text
from esm2mega.data.readers.base import MISSING_VALUES, RecordSource, SourceOptions
from esm2mega.data.readers.sources import open_source
from esm2mega.errors import UserError

DEFAULT = SourceOptions()


def source(tmp_path: Path, name: str, content: bytes, options: SourceOptions = DEFAULT) -> RecordSource:
    path = tmp_path / name
    path.write_bytes(content)
    return open_source(path, options)


def read(tmp_path: Path, name: str, content: bytes, options: SourceOptions = DEFAULT) -> list[tuple]:
    return [tuple(record) for record in source(tmp_path, name, content, options)]


def message(tmp_path: Path, name: str, content: bytes, options: SourceOptions = DEFAULT) -> str:
    """The error, without the directory, after checking that it is one line that names the file."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content, options)
    shown = str(caught.value)
    assert "\n" not in shown and shown.startswith(f"{tmp_path}/{name}")
    return shown.removeprefix(f"{tmp_path}/")


EXPECTED = [("a", b"MKTL", 2), ("b", b"acJ", 3)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"id,sequence\na,MKTL\nb,acJ\n"),
        ("t.csv", b"id,sequence\na,MKTL\nb,acJ"),
        ("t.csv", b"id,sequence\r\na,MKTL\r\nb,acJ\r\n"),
        ("t.csv", b"\xef\xbb\xbfid,sequence\na,MKTL\nb,acJ\n\n"),
        ("t.csv", b'sequence,id,target\n"MKTL",a,"1,5"\nacJ,"b","x ""y"""\n'),
        ("t.csv", b"id;sequence;x\na;MKTL;1,5\nb;a c J;2,5\n"),
        ("t.tsv", b"id\tsequence\na\tMKTL\nb\tacJ\n"),
        ("t.CSV.gz", gzip.compress(b"id,sequence\na,MKTL\nb,acJ\n", mtime=0)),
        ("t.jsonl", b'\n{"id": "a", "sequence": "MKTL"}\n{"sequence": "acJ", "id": "b", "n": null}\n'),
        ("t.ndjson", b'\xef\xbb\xbf\r\n{"id":"a","sequence":"M K T L"}\r\n{"id":"b","sequence":"acJ"}'),
    ],
)
def test_tables_are_read_as_written(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path, name, content) == EXPECTED


def test_named_columns(tmp_path: Path) -> None:
    options = SourceOptions(sequence_column="Seq (aa)", id_column="accession")
    content = b"accession,id,Seq (aa)\nP1,x,MK\n"
    assert read(tmp_path, "t.csv", content, options) == [("P1", b"MK", 2)]
    row = {"accession": 7, "text": "M K T"}
    options = SourceOptions(sequence_column="text", id_column="accession")
    assert read(tmp_path, "t.jsonl", json.dumps(row).encode(), options) == [("7", b"MKT", 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b'sequence,note\nMK,"two\nlines"\n\nAC,x\n'),
        ("t.jsonl", b'\n{"sequence": "MK"}\n\n\n{"sequence": "AC"}\n'),
    ],
)
def test_without_ids_line_numbers_are_ids_and_that_is_said(tmp_path: Path, name: str, content: bytes) -> None:
    table = source(tmp_path, name, content)
    assert [record.id for record in table] == ["2", "5"]
    assert table.notes() == [f"{tmp_path / name}: has no 'id', so the ids are line numbers"]
    assert source(tmp_path, "with.csv", b"id,sequence\na,M\n").notes() == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"", "t.csv:1: no header"),
        ("t.csv", b"id,sequence\n\n", "t.csv: no rows under the header"),
        ("t.csv", b">a\nMK\n", "t.csv: is FASTA, not CSV"),
        ("t.csv", b"\x89PNG\x00\n", "t.csv: is a binary file"),
        (
            "t.csv",
            b"name,Sequences\na,MK\n",
            "t.csv: no column 'sequence' among name, Sequences; did you mean --sequence-column Sequences?",
        ),
        ("t.csv", b"a,b\n1,2\n", "t.csv: no column 'sequence' among a, b; name one of them with"),
        ("t.csv", b"id,sequence,sequence\n1,M,K\n", "t.csv: has 2 columns 'sequence'"),
        ("t.csv", b"id,sequence\na,MK\nb\n", "t.csv:3: has 1 fields, the header has 2"),
        ("t.csv", b"id,sequence\na,MK,AC\n", "t.csv:2: has 3 fields, the header has 2"),
        ("t.csv", b"id,sequence\na,MK\nb,\n", "t.csv:3: the sequence of 'b' is empty; complete or remove"),
        ("t.csv", b"id,sequence\na,NaN\n", "t.csv:2: the sequence of 'a' 'NaN' is a missing value"),
        ("t.csv", b"id,sequence\na,1.5\n", "t.csv:2: '1' in the sequence of 'a' is no residue"),
        ("t.csv", "id,sequence\na,M\u00c5K\n".encode(), "t.csv:2: '\u00c5' in the sequence of 'a'"),
        ("t.csv", b"id,sequence\nx,MK\na\xe9,MK\n", "t.csv:3: is not UTF-8"),
        ("t.csv", b"id,sequence\na,MK\n,MK\n", "t.csv:3: the id '' is empty"),
        ("t.csv", b"id,sequence\na,MK\n \t,MK\n", "t.csv:3: the id ' \\t' is blank"),
        ("t.csv", b"id,sequence\na\x01,MK\n", "t.csv:2: the id 'a\\x01' holds unprintable characters"),
        ("t.csv", b'id,sequence\n"x\ny",MK\n', "t.csv:2: the id 'x\\ny' holds unprintable characters"),
        ("t.csv", b'id,sequence\na,MK\n"b"c,MK\n', "t.csv:3: not CSV ("),
        ("t.csv", b'id,sequence\na,MK\nb,"MK\nc,AC\n', "t.csv:3: not CSV (unexpected end of data)"),
        (
            "t.csv.gz",
            gzip.compress(b"id,sequence\na,MK\n", mtime=0)[:-9],
            "t.csv.gz: the gzip data ends early",
        ),
        ("t.csv", b"id,sequence\ra,MK\rb,MK\r", "t.csv:1: has carriage returns without line feeds"),
        ("t.tsv", b"id\tsequence\ra\tMK\r", "t.tsv:1: has carriage returns without line feeds"),
        ("t.csv", b"id,s\requence\r\na,MK\r\n", "t.csv:1: has carriage returns without line feeds"),
        ("t.csv", b"id,sequence,\xe9\na,MK,1\n", "t.csv:1: is not UTF-8; convert the file"),
        ("t.csv", b'"id,sequence\na,MK\n', "t.csv:1: not CSV (unexpected end of data); correct the header"),
        (
            "t.jsonl",
            b'{"id": [[[[[[[[1]]]]]]]], "sequence": "MK"}\n',
            "t.jsonl:1: the id [[[[[[[...]]]]]]] is a list",
        ),
        ("t.jsonl", b"", "t.jsonl: no objects in the file"),
        ("t.jsonl", b'[{"sequence": "MK"},\n {"sequence": "AC"}]\n', "t.jsonl:1: not JSON ("),
        (
            "t.jsonl",
            b'[{"sequence": "MK"}]\n',
            "t.jsonl:1: not a JSON object; write one object per line (turn",
        ),
        ("t.jsonl", b'{"sequence": "MK"}\n{"sequence": \n', "t.jsonl:2: not JSON ("),
        ("t.jsonl", b"[" * 100_000, "t.jsonl:1: not JSON ("),
        ("t.jsonl", b'{"seq": "MK"}\n', "t.jsonl: no key 'sequence' among seq; did you mean"),
        ("t.jsonl", b'{"sequence": "MK"}\n{"seq": "MK"}\n', "t.jsonl:2: no key 'sequence', which the first"),
        ("t.jsonl", b'{"sequence": "MK"}\n{"sequence": 5}\n', "t.jsonl:2: 'sequence' of '2' is a number"),
        ("t.jsonl", b'{"sequence": NaN}\n', "t.jsonl:1: 'sequence' of '1' is a number"),
        ("t.jsonl", b'{"sequence": ["MK"]}\n', "t.jsonl:1: 'sequence' of '1' is a list"),
        ("t.jsonl", b'{"sequence": null}\n', "t.jsonl:1: the sequence of '1' is empty"),
        ("t.jsonl", b'{"sequence": "\\ud800"}\n', "t.jsonl:1: '\ufffd' in the sequence of '1'"),
        ("t.jsonl", b'{"id": 1.5, "sequence": "MK"}\n', "t.jsonl:1: the id 1.5 is a number"),
        ("t.jsonl", b'{"id": null, "sequence": "MK"}\n', "t.jsonl:1: the id None is empty"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    assert message(tmp_path, name, content).startswith(expected)


def test_a_missing_id_column_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    options = SourceOptions(id_column="acession")
    expected = "t.csv: no column 'acession' among accession, sequence; did you mean --id-column accession?"
    assert message(tmp_path, "t.csv", b"accession,sequence\na,MK\n", options) == expected


@pytest.mark.parametrize("cell", ["", " ", "nan", "NaN", "null", "None", "<NA>"])
def test_empty_rows_are_dropped_only_on_demand(tmp_path: Path, cell: str) -> None:
    content = f"id,sequence\na,MK\nb,{cell}\nc,AC\n".encode()
    found = read(tmp_path, "t.csv", content, SourceOptions(drop_empty=True))
    assert found == [("a", b"MK", 2), ("b", b"", 3), ("c", b"AC", 4)]  # b is there to be counted
    assert "--drop-empty" in message(tmp_path, "t.csv", content)


def test_a_sequence_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    long = b"MKTLAGVSER" * 100_000
    # The limit is of the process, in which longer cells may have been read before.
    before = csv.field_size_limit(1 << 17)
    try:
        found = read(tmp_path, "t.csv", b"id,sequence\nx," + long + b"\ny,M\n")
    finally:
        csv.field_size_limit(before)
    assert found == [("x", long, 2), ("y", b"M", 3)]


CELL = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=6
)
RESIDUES = st.text("ACDEFGHIKLMNPQRSTVWYXacdj*-.", min_size=1, max_size=30).filter(
    lambda residues: residues not in MISSING_VALUES
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(CELL, RESIDUES), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;\t"),
    newline=st.sampled_from(["\n", "\r\n"]),
    block_bytes=st.integers(1, 30),
)
def test_any_table_reads_as_with_pyarrow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[str, str]],
    delimiter: str,
    newline: str,
    block_bytes: int,
) -> None:
    # Whatever is in another column, quotes and line ends included, blocks are cut between rows.
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, lineterminator=newline)
    writer.writerows([("note", "sequence", "id"), *((note, s, f"p{i}") for i, (note, s) in enumerate(rows))])
    content = written.getvalue().encode()
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    found = [(name, residues.decode()) for name, residues, _ in read(tmp_path, "t.csv", content)]
    reference = pyarrow.csv.read_csv(
        io.BytesIO(content),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={"sequence": pa.string(), "id": pa.string()}),
    )
    assert found == list(zip(*reference.select(["id", "sequence"]).to_pydict().values(), strict=True))


@pytest.mark.parametrize("block_bytes", [1, 2, 7, 15])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b'id,sequence,note\na,MK,"1\n2\n""3"""\n\nb,AC,\nc,W,"\n"\n'),
        ("t.jsonl", b'{"id": "a", "sequence": "MK"}\n\n{"id": "b", "sequence": "AC"}\n'),
    ],
)
def test_block_borders_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, block_bytes: int
) -> None:
    whole = read(tmp_path, name, content)
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    assert read(tmp_path, name, content) == whole
    assert len(list(source(tmp_path, name, content).blocks())) > 1
