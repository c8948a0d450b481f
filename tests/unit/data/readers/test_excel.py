"""Workbooks of Excel: the same proteins and labels as from CSV, and what is no table."""

from __future__ import annotations

import datetime
import io
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.excel import read_sheet
from esm2mega.data.readers.sources import open_source
from esm2mega.data.store.cache import open_store
from esm2mega.errors import UserError
from esm2mega.infer.variant_tables import read_table
from tests.fuzz.mutations import BYTES

openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed: pip install esm2mega[excel]")

HEADER = ["id", "sequence", "target", "class"]
ROWS = [["a", "MKT", 1.5, 7], [2, "mkv w", -3, "x"], ["c", "MKQ", None, "007"]]


def book(path: Path, **sheets: list[list[object]]) -> Path:
    workbook = openpyxl.Workbook()
    workbook.remove(workbook.active)
    for name, rows in sheets.items():
        sheet = workbook.create_sheet(name)
        for row in rows:
            sheet.append(row)
    workbook.save(path)
    return path


def csv(path: Path) -> Path:
    rows = [HEADER, *ROWS]
    path.write_text("".join(",".join("" if x is None else str(x) for x in row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", [TaskConfig("regression"), TaskConfig("classification", ["class"])])
def test_a_sheet_is_read_as_the_same_table_in_csv(tmp_path: Path, task: TaskConfig) -> None:
    """Blank rows above and between are none, nor are columns without a name that hold nothing."""
    rows = [[], [*HEADER, None, " "], ROWS[0], [], [None, "  "], [*ROWS[1], "  "], ROWS[2][:4]]
    path = book(tmp_path / "t.xlsx", first=[["nothing"]], Assay=rows)
    expected, meaning = read_labelled(csv(tmp_path / "t.csv"), task, DataConfig(), None, "data.train")
    found, info = read_labelled(f"{path}#Assay", task, DataConfig(), None, "data.train")
    assert found.fingerprint == expected.fingerprint and info == meaning and found.ids == ["a", "2", "c"]
    records = list(open_source(f"{path}#Assay", SourceOptions()))
    assert [(record.id, record.residues, record.line) for record in records] == [
        *[("a", b"MKT", 3), ("2", b"mkvw", 6), ("c", b"MKQ", 7)]
    ]


def test_the_first_sheet_is_read_unless_one_is_named(tmp_path: Path) -> None:
    one, two = [["sequence"], ["MK"]], [["sequence"], ["MV"]]
    path = book(tmp_path / "t.xlsx", **{"b": one, "a 2": two})
    for name, expected in ((f"{path}", b"MK"), (f"{path}#b", b"MK"), (f"{path}#a 2", b"MV")):
        assert [record.residues for record in open_source(name, SourceOptions())] == [expected]
    with pytest.raises(UserError, match=r"t.xlsx#c: has no sheet 'c'; its sheets are b, a 2"):
        open_source(f"{path}#c", SourceOptions())
    data = DataConfig(cache_dir=str(tmp_path / "c"))
    stores = [open_store(name, data, None, "x") for name in (f"{path}#b", f"{path}#a 2")]
    assert stores[0].tokens.tolist() != stores[1].tokens.tolist()
    file = tmp_path / "odd.xlsx#c"  # a file of this name is that file
    file.write_bytes(path.read_bytes())
    assert [record.residues for record in open_source(file, SourceOptions(format="excel"))] == [b"MK"]


def test_variants_of_a_workbook_are_scored_as_those_of_a_csv(tmp_path: Path) -> None:
    path = book(tmp_path / "v.xlsx", x=[["mutant", "DMS_score"], ["A1G", 0.5], [], ["A2G", None]])
    table = read_table(path)
    assert table.columns == ["mutant", "DMS_score"] and table.rows == [["A1G", "0.5"], ["A2G", ""]]
    assert table.lines == [2, 4]
    with pytest.raises(UserError, match=r"none.xlsx: no such Excel file"):
        read_table(tmp_path / "none.xlsx")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.xls"
    old.write_bytes(b"\xd0\xcf\x11\xe0" + b"\0" * 600)
    with pytest.raises(UserError, match=r"old.xls: is no workbook of Excel 2007 or later, or has a password"):
        open_source(old, SourceOptions())
    empty = book(tmp_path / "empty.xlsx", a=[])
    with pytest.raises(UserError, match=r"the sheet is empty; name another one as .*empty.xlsx#SHEET"):
        open_source(empty, SourceOptions())
    with pytest.raises(UserError, match=r"h.xlsx: has no rows under the header"):
        open_source(book(tmp_path / "h.xlsx", a=[["sequence"]]), SourceOptions())
    with pytest.raises(UserError, match=r"w.xlsx: row 2: has a cell beyond the 1 columns that row 1 names"):
        open_source(book(tmp_path / "w.xlsx", a=[["sequence"], ["MK", None, 3]]), SourceOptions())
    with pytest.raises(UserError, match=r"c.xlsx: no column 'sequence' among x"):
        open_source(book(tmp_path / "c.xlsx", a=[["x"], ["MK"]]), SourceOptions())


def test_values_that_excel_makes_of_what_was_typed_are_named(tmp_path: Path) -> None:
    """A date in the place of a name or number, and a formula that nothing has computed."""
    date = datetime.datetime(2026, 3, 1)
    path = book(tmp_path / "d.xlsx", a=[["id", "sequence", "target"], ["a", "MK", 1], ["b", "ML", date]])
    with pytest.raises(UserError, match=r"d.xlsx: row 3: .*datetime.* in column 'target' is not a number"):
        read_labelled(path, TaskConfig("regression"), DataConfig(), None, "data.train")
    path = book(tmp_path / "i.xlsx", a=[["id", "sequence"], [date, "MK"]])
    with pytest.raises(UserError, match=r"i.xlsx: row 2: the id .* is of type datetime"):
        list(open_source(path, SourceOptions()))
    path = book(tmp_path / "f.xlsx", a=[["sequence", "target"], ["MK", "=1+1"]])
    with pytest.raises(UserError, match=r"f.xlsx: row 2: column 2 holds the formula '=1\+1' without a value"):
        open_source(path, SourceOptions())


def sheet_xml(path: Path, sheet: str) -> Path:
    """Write a workbook by hand, around the XML of a sheet."""
    book(path, a=[["x"]])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["xl/worksheets/sheet1.xml"] = sheet.encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


NAMESPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def cell(place: str, text: str) -> str:
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


def test_a_crafted_workbook_ends_in_one_line(tmp_path: Path) -> None:
    head = f'<row r="1">{cell("A1", "sequence")}</row>'
    far = f'<row r="999999999999">{cell("A999999999999", "MK")}</row>'
    large = f'<worksheet {NAMESPACE}><dimension ref="A1:ZZZ9999999"/><sheetData>'
    path = sheet_xml(tmp_path / "n.xlsx", f"{large}{head}{far}</sheetData></worksheet>")
    with pytest.raises(UserError, match=r"n.xlsx: has more than 1,048,576 rows; save"):
        open_source(path, SourceOptions())
    for number, text in enumerate(("<worksheet", f"<worksheet {NAMESPACE}><sheetData><row r='x'/>")):
        path = sheet_xml(tmp_path / f"{number}.xlsx", text)
        with pytest.raises(UserError, match=r"\.xlsx: is not a readable workbook \("):
            open_source(path, SourceOptions())
    entity = '<!DOCTYPE w [<!ENTITY a "MKMK">]>'
    text = f'{entity}<worksheet {NAMESPACE}><sheetData>{head}<row r="2">{cell("A2", "&a;")}</row></sheetData>'
    with pytest.raises(UserError, match=r"e.xlsx: is not a readable workbook \("):
        open_source(sheet_xml(tmp_path / "e.xlsx", f"{text}</worksheet>"), SourceOptions())


def test_a_workbook_that_unpacks_to_more_than_the_limit(tmp_path: Path, monkeypatch) -> None:
    path = book(tmp_path / "t.xlsx", a=[["sequence"], ["MK"]])
    assert len(read_sheet(path).rows) == 1
    monkeypatch.setattr("esm2mega.data.readers.excel._MOST_BYTES", 1 << 10)
    with pytest.raises(UserError, match=r"t.xlsx: takes 0 MiB when it is unpacked, the limit is 0; save"):
        read_sheet(path)


def test_a_store_is_prepared_from_a_workbook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plain = book(tmp_path / "t.xlsx", a=[HEADER, *ROWS]), csv(tmp_path / "t.csv")
    for source, out in ((path, "x"), (plain, "c")):
        assert main(["prepare", "fasta", str(source), "--out", str(tmp_path / out), "--workers", "1"]) == 0
    contents = [(tmp_path / out / "train" / "tokens.bin").read_bytes() for out in ("x", "c")]
    assert contents[0] == contents[1]


def damaged(rng: random.Random, workbook: bytes) -> bytes:
    """The workbook, or the XML of one of its members, with bits, blocks or words changed."""
    if rng.random() < 0.3:
        return rng.choice(BYTES)(rng, workbook)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(workbook)) as old, zipfile.ZipFile(packed, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name != chosen:
                new.writestr(name, content)
            elif rng.random() < 0.9:  # else it is left out
                new.writestr(name, rng.choice(BYTES)(rng, content))
    return packed.getvalue()


def check_damaged(folder: Path, seeds: range) -> None:
    """Each is read, or refused in one line; both happen."""
    good = book(folder / "good.xlsx", one=[HEADER, *ROWS], two=[["sequence"], ["MK"]]).read_bytes()
    path, ends = folder / "t.xlsx", Counter[str]()
    for seed in seeds:
        path.write_bytes(damaged(random.Random(seed), good))
        try:
            read_labelled(path, TaskConfig("regression"), DataConfig(), None, "data.train")
            ends["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), (seed, str(error))
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > len(seeds) // 10


def test_damaged_workbooks_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    check_damaged(tmp_path, range(60))


@pytest.mark.slow
def test_many_damaged_workbooks(tmp_path: Path) -> None:
    check_damaged(tmp_path, range(60, 2000))
