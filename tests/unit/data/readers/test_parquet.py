"""Parquet: row groups, types of columns, damaged files."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esm2mega.data.readers import parquet
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.parquet import ParquetReader
from esm2mega.data.readers.row_files import ParquetFile
from esm2mega.errors import UserError

DEFAULT = SourceOptions()
ROWS = [("a", "MKTL"), ("b", "acJ"), ("c", "W"), ("a", "L A G")]


def write(tmp_path: Path, table: pa.Table, **options: object) -> Path:
    pq.write_table(table, tmp_path / "t.parquet", **options)
    return tmp_path / "t.parquet"


def table(kind: pa.DataType) -> pa.Table:
    names, sequences = zip(*ROWS, strict=True)
    return pa.table({"n": range(4), "sequence": pa.array(sequences).cast(kind), "id": names})


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()]
    + [pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())],
    ids=str,
)
@pytest.mark.parametrize("group", [1, 3, 100])
def test_rows_of_all_text_types_and_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType, group: int
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 2)
    reader = ParquetReader(write(tmp_path, table(kind), row_group_size=group), DEFAULT)
    assert [tuple(record) for record in reader] == [
        ("a", b"MKTL", 1),
        ("b", b"acJ", 2),
        ("c", b"W", 3),
        ("a", b"LAG", 4),
    ]
    assert [(block.line, block.stop) for block in reader.blocks()] == {
        1: [(1, 2), (2, 3), (3, 4), (4, 5)],
        3: [(1, 4), (4, 5)],
        100: [(1, 5)],
    }[group]
    assert reader.notes() == []


def test_empty_row_groups_are_passed_over(tmp_path: Path) -> None:
    whole = table(pa.string())
    with pq.ParquetWriter(tmp_path / "t.parquet", whole.schema) as writer:
        for part in (whole[:0], whole[:2], whole[:0], whole[:0], whole[2:], whole[:0]):
            writer.write_table(part)
    reader = ParquetReader(tmp_path / "t.parquet", DEFAULT)
    assert [record.residues for record in reader] == [b"MKTL", b"acJ", b"W", b"LAG"]


def test_integer_ids_and_row_numbers(tmp_path: Path) -> None:
    columns = {"sequence": ["MK", "AC"], "key": [7, 8]}
    path = write(tmp_path, pa.table(columns))
    assert [r.id for r in ParquetReader(path, SourceOptions(id_column="key"))] == ["7", "8"]
    numbered = ParquetReader(path, DEFAULT)
    assert [record.id for record in numbered] == ["1", "2"]
    assert numbered.notes() == [f"{path}: has no 'id', so the ids are row numbers"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"seq": ["MK"]}, "no column 'sequence' among seq; did you mean --sequence-column seq?"),
        ({"sequence": [1.5]}, "the column 'sequence' holds double, not text"),
        ({"sequence": [["MK"]]}, "the column 'sequence' holds list"),
        ({"sequence": ["MK"], "id": [1.5]}, "the column 'id' holds double, not text; name another with --id"),
        ({"sequence": ["MK", None]}, "row 2: the sequence of '2' is empty"),
        ({"sequence": ["MK"], "id": pa.array([None], pa.string())}, "row 1: the id None is empty"),
        ({"sequence": ["MK", "nan"]}, "row 2: the sequence of '2' 'nan' is a missing value"),
        ({"sequence": ["MK", "M1"]}, "row 2: '1' in the sequence of '2' is no residue"),
        ({"sequence": [b"MK", b"M\xff"]}, "row 2: '\ufffd' in the sequence of '2' is no residue"),
        ({"sequence": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, columns: dict[str, object], expected: str) -> None:
    path = write(tmp_path, pa.table(columns))
    with pytest.raises(UserError) as caught:
        list(ParquetReader(path, DEFAULT))
    assert str(caught.value).startswith(f"{path}: {expected}") and "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path, table(pa.string()))
    whole = path.read_bytes()
    for content in (b"", b"id,sequence\na,MK\n", whole[:-20], whole[:4] + b"\xff" * 300 + whole[304:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"t.parquet: is not a readable Parquet file"):
            list(ParquetReader(path, DEFAULT))
    with pytest.raises(UserError, match="no such Parquet file"):
        ParquetReader(tmp_path / "absent.parquet", DEFAULT)


def test_a_page_that_pyarrow_leaves_out(tmp_path: Path) -> None:
    """The dictionary of the last row group, which is said to be a page of another kind, without an error."""
    path = write(tmp_path, table(pa.string()), row_group_size=2)
    column = pq.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    content[column.dictionary_page_offset + 1] ^= 2
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t.parquet: is damaged: 2 rows can be read where .* say 4; copy"):
        list(ParquetReader(path, DEFAULT))
    with pytest.raises(UserError, match=r"t.parquet: is damaged: 2 rows can be read where .* say 4; copy"):
        list(ParquetFile(path, ["sequence"]).rows())


def test_metadata_at_which_pyarrow_aborts(tmp_path: Path) -> None:
    """A list without entries of the statistics of a column is said to have two."""
    path = write(tmp_path, pa.table({"sequence": ["MKTL"] * 10}))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x19\x06\x19\x26", b"\x19\x26\x19\x26", 1))
    with pytest.raises(UserError, match=r"t.parquet: is not a readable Parquet file \(.* histogram size"):
        list(ParquetReader(path, DEFAULT))


def test_white_space_in_cells(tmp_path: Path) -> None:
    """What wraps or groups residues is removed; a control character is no residue."""
    path = write(tmp_path, pa.table({"sequence": ["MK T\r\nL\tA\n"]}))
    assert [record.residues for record in ParquetReader(path, DEFAULT)] == [b"MKTLA"]
    for stray in "\v\f\x1f\xa0":
        path = write(tmp_path, pa.table({"sequence": [f"MK{stray}T"]}))
        with pytest.raises(UserError, match="in the sequence of '1' is no residue"):
            list(ParquetReader(path, DEFAULT))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"M\xff"], pa.binary()).buffers())
    path = write(tmp_path, pa.table({"sequence": broken}))
    with pytest.raises(UserError, match=r"t.parquet: is not a readable Parquet file \('utf-8' codec"):
        list(ParquetReader(path, DEFAULT))


def test_without_pyarrow_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, table(pa.string()))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'esm2mega\[parquet\]'"):
        ParquetReader(path, DEFAULT)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string_view()),
        pa.list_(pa.binary()),
    ]
    + [pa.list_(pa.dictionary(pa.int8(), pa.string())), pa.list_(pa.string(), 2)],
    ids=str,
)
def test_lists_of_all_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    labels = [["C", "H"], ["H", None]]
    rows = pa.table({"sequence": ["MK", "AC"], "labels": pa.array(labels, kind)})
    reader = ParquetReader(write(tmp_path, rows), DEFAULT)
    (block,) = reader.blocks()
    assert [cells["labels"] for _, cells in reader.rows(block)] == labels
