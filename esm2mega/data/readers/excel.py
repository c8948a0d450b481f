"""Reads a sheet of an Excel workbook, of which formulas give the values they had; needs the extra `excel`.

A workbook is a ZIP archive of XML. What it claims to hold is compared with limits before it is unpacked, and
neither macros, links nor formulas are followed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from esm2mega.data.readers.base import Block, ByteProgress, RowSource, SourceOptions
from esm2mega.data.readers.columns import TableReader
from esm2mega.errors import UserError
from esm2mega.files import first_of, split_sheet

_MOST_BYTES = 512 << 20
"""A workbook takes at most so much when it is unpacked; large tables are better kept as CSV or Parquet."""

_MOST_ROWS = 1 << 20
"""A sheet of Excel has no more rows, whatever numbers a file gives them."""

_SAVE_AGAIN = "open it in Excel or LibreOffice and save it as .xlsx or CSV"

Cells = tuple[Any, ...]


class Sheet(NamedTuple):
    """Holds a sheet: its first line that is not blank names the columns.

    Attributes:
        columns: Names of the columns.
        rows: Number of each row that is not blank, as Excel shows it, and its cells.
    """

    columns: list[str]
    rows: list[tuple[int, Cells]]


def read_sheet(path: str | Path) -> Sheet:
    """Read a sheet of the workbook that `path` names, with all formulas replaced by their values.

    Args:
        path: A workbook, for its first sheet, or ``FILE.xlsx#SHEET``.

    Raises:
        UserError: openpyxl is not installed, the file is no workbook or too large, there is no such sheet, or
            a cell holds a formula that was never computed, or has no column.
    """
    file, name = split_sheet(path)
    _check(path, file)
    rows = _rows(path, file, name, values=True)
    if not rows:
        raise UserError(f"{path}: the sheet is empty; name another one as {file}#SHEET")
    if any(cell is None for _, cells in rows for cell in cells):
        _check_formulas(path, rows, _rows(path, file, name, values=False))
    (first, header), *rest = rows
    columns = ["" if cell is None else str(cell).strip() for cell in header]
    while columns and not columns[-1]:
        columns.pop()
    width = len(columns)
    for number, cells in rest:
        if any(cell is not None for cell in cells[width:]):
            raise UserError(
                f"{path}: row {number}: has a cell beyond the {width} columns that row {first} names; name "
                "its column there, or remove it"
            )
    return Sheet(columns, [(number, (*cells, *[None] * width)[:width]) for number, cells in rest])


class ExcelReader(RowSource, TableReader):
    """Reads the rows of a sheet, which are in memory; cells hold text, numbers, truth values or dates."""

    numbers = "row numbers"

    def __init__(
        self, path: str | Path, options: SourceOptions, progress: ByteProgress | None = None
    ) -> None:
        """Read the sheet; raise UserError when a column is missing."""
        super().__init__(path, progress)
        self._file = split_sheet(path)[0]
        self._check_file(self._file, "Excel")
        sheet = read_sheet(path)
        self._rows = dict(sheet.rows)
        self._find_columns(sheet.columns, options)
        if not self._rows:
            raise UserError(f"{self.path}: has no rows under the header; give a table with sequences")

    def files(self) -> list[Path]:
        return [self._file]

    def rows(self, block: Block) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number in range(block.line, block.stop):
            if number in self._rows:
                yield number, dict(zip(self.columns, self._rows[number], strict=True))

    def _ranges(self) -> list[tuple[int, int]]:
        return [(min(self._rows) - 1, max(self._rows))]

    def _reading(self) -> str:
        return f"{super()._reading()} {split_sheet(self.path)[1]}"


def _check(path: str | Path, file: Path) -> None:
    """Refuse what is no workbook, or is too large when it is unpacked."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path}: is no workbook of Excel 2007 or later, or has a password ({error}); {_SAVE_AGAIN}"
        ) from None
    if size > _MOST_BYTES:
        raise UserError(
            f"{path}: takes {size >> 20} MiB when it is unpacked, the limit is {_MOST_BYTES >> 20}; save the "
            "table as CSV"
        )


def _rows(path: str | Path, file: Path, name: str | None, values: bool) -> list[tuple[int, Cells]]:
    """Return the rows that are not blank, with values of formulas, or with formulas as text."""
    try:
        with file.open("rb") as stream, closing(_opened(stream, values)) as book:
            sheets = {sheet.title: sheet for sheet in book.worksheets}
            if name is not None and name not in sheets:
                raise UserError(f"{path}: has no sheet {name!r}; its sheets are {first_of(list(sheets))}")
            if not sheets:
                raise UserError(f"{path}: has no sheet with cells; {_SAVE_AGAIN}")
            sheet = next(iter(sheets.values())) if name is None else sheets[name]
            sheet.reset_dimensions()  # what a file says of its own size may be wrong
            found = []
            for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
                if number > _MOST_ROWS:
                    raise UserError(f"{path}: has more than {_MOST_ROWS:,} rows; save the table as CSV")
                cells = tuple(None if isinstance(cell, str) and not cell.strip() else cell for cell in cells)
                if any(cell is not None for cell in cells):
                    found.append((number, cells))
            return found
    except ImportError:
        raise UserError(
            f"{path}: reading Excel needs openpyxl; install it with `pip install 'esm2mega[excel]'`, or save "
            "the table as CSV"
        ) from None
    except UserError:
        raise
    except Exception as error:  # openpyxl lets through whatever its parsers raise of a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: is not a readable workbook ({reason}); {_SAVE_AGAIN}") from None


def _opened(stream: BinaryIO, values: bool) -> Any:
    import openpyxl

    return openpyxl.load_workbook(stream, read_only=True, data_only=values, keep_links=False)


def _check_formulas(
    path: str | Path, values: Sequence[tuple[int, Cells]], formulas: Sequence[tuple[int, Cells]]
) -> None:
    """Refuse a formula without a value, which would be read as a missing one."""
    found = dict(values)
    for number, cells in formulas:
        there = found.get(number, ())
        for column, cell in enumerate(cells):
            value = there[column] if column < len(there) else None
            if value is None and isinstance(cell, str) and cell.startswith("="):
                raise UserError(
                    f"{path}: row {number}: column {column + 1} holds the formula {cell[:40]!r} without a "
                    f"value, since no program has computed it; {_SAVE_AGAIN}"
                )
