"""Reads and writes the tables that hold variants and their scores."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from esm2mega.data.readers.excel import read_sheet
from esm2mega.data.readers.sources import format_of
from esm2mega.data.readers.text import bounded_lines, open_text
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, refuse_stream, replacing, split_sheet

_DELIMITERS = ",\t;"


@dataclass
class Table:
    """Holds a CSV in memory: rows as they were read, with their line numbers for messages."""

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str, option: str) -> list[str]:
        """Return the cells of a column; `option` is the command-line option that names another column.

        Raises:
            UserError: The table has no such column, or more than one.
        """
        if self.columns.count(name) != 1:
            problem = "no" if name not in self.columns else "more than one"
            raise UserError(
                f"{self.path}: has {problem} column {name!r} among {', '.join(self.columns)}; "
                f"name one with {option}"
            )
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def location(self, row: int) -> str:
        """Return the file and line of a row."""
        return f"{self.path}:{self.lines[row]}"


def read_table(path: str | Path) -> Table:
    """Read a CSV with a header, also compressed; commas, tabs or semicolons, what the header has most of.

    Raises:
        UserError: The file is missing or empty, is no CSV, or a row has more or fewer cells than the header.
    """
    refuse_stream(path)
    if format_of(Path(path)) == "excel":
        return _read_workbook(path)
    try:
        with open_text(Path(path)) as content, io.TextIOWrapper(content, "utf-8", newline="") as stream:
            lines_of_text = bounded_lines(Path(path), stream)
            header = next(lines_of_text, "")
            delimiter = max(_DELIMITERS, key=header.count)
            reader = csv.reader(chain([header], lines_of_text), delimiter=delimiter, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            rows, lines = [], []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(columns):
                    raise UserError(
                        f"{path}:{reader.line_num}: has {len(row)} cells, the header has {len(columns)}; "
                        "put double quotes around a cell that holds the delimiter"
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV ({error}); give a table with a header line") from None
    if not rows:
        raise UserError(f"{path}: has no rows under a header; give a table of variants")
    return Table(Path(path), columns, rows, lines)


def _read_workbook(path: str | Path) -> Table:
    """Read a sheet as a table of texts; a cell without a value becomes an empty one."""
    if not split_sheet(path)[0].is_file():
        raise UserError(f"{path}: no such Excel file")
    sheet = read_sheet(path)
    if not sheet.rows:
        raise UserError(f"{path}: has no rows under a header; give a table of variants")
    rows = [["" if cell is None else str(cell) for cell in cells] for _, cells in sheet.rows]
    return Table(Path(path), sheet.columns, rows, [number for number, _ in sheet.rows])


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV, which appears under its name when it is complete.

    Raises:
        MachineError: The disk is full, or the path cannot be written.
    """
    with replacing(path, OTHER_OUT) as partial, partial.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
