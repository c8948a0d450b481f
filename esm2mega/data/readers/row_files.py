"""Reads proteins and ids from binary files of rows: Parquet and SQLite.

Messages name a row, counted from 1.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from esm2mega.data.readers.base import ByteProgress, Record, require_columns, residues_of
from esm2mega.data.readers.parquet import check_rows, check_sizes, open_parquet
from esm2mega.errors import UserError
from esm2mega.files import file_sha256, refuse_stream, shortened

_ROWS = 1 << 14


class RowFile:
    """Hashes a binary file of rows before it is read, since rows are not read in the order of the file."""

    kind = ""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Check that the file exists.

        Args:
            path: path of the file.
            progress: told about the bytes of the file, once.
        """
        self.path = Path(path)
        self.sha256 = ""
        self._progress = progress
        refuse_stream(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such {self.kind} file")

    def location(self, line: int) -> str:
        """Say where a row stands, for messages."""
        return f"{self.path}: row {line}"

    def hash(self) -> None:
        """Read the whole file for `sha256`, once."""
        if self.sha256:
            return
        self.sha256 = file_sha256(self.path)
        if self._progress is not None:
            self._progress.update(self.path.stat().st_size)

    def text(self, value: object, line: int, column: str) -> str:
        """Return the value of a column, or raise UserError if it is no text or blank."""
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{self.location(line)}: {column} is {shortened(value)}, not a text; every row needs one"
            )
        return value


class ParquetFile(RowFile):
    """Reads chosen columns of the rows of one Parquet file."""

    kind = "Parquet"

    def __init__(
        self, path: str | Path, columns: Sequence[str], progress: ByteProgress | None = None
    ) -> None:
        """Open the file and look for the columns.

        Args:
            path: path of the file.
            columns: names of columns that must be there.
            progress: told about the bytes of the file.
        """
        super().__init__(path, progress)
        self.columns = list(columns)
        with open_parquet(self.path) as file:
            self.available = list(file.schema_arrow.names)
            self.num_rows = int(file.metadata.num_rows)
        require_columns(str(self.path), self.available, columns, "give a file that has it")

    def rows(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield each row's number, from 1, and the values of its columns; None for missing values."""
        self.hash()
        number = 0
        with open_parquet(self.path) as file:
            first = 1
            for group in range(file.num_row_groups):
                check_sizes(self.path, file, self.columns, group, first)
                first += file.metadata.row_group(group).num_rows
            for batch in file.iter_batches(_ROWS, columns=self.columns):
                for values in zip(*(batch.column(name).to_pylist() for name in self.columns), strict=True):
                    number += 1
                    yield number, values
        check_rows(self.path, number, self.num_rows)
        if not number:
            raise UserError(f"{self.path}: has no rows; give a file with data")


class ProteinDatabase(RowFile):
    """Iterates over the proteins of a SQLite file in the order in which they lie in it."""

    kind = "SQLite"

    def __iter__(self) -> Iterator[Record]:
        """Yield the proteins."""
        self.hash()
        # Nobody writes to the file meanwhile; without locks it can be read in a read-only directory.
        address = f"file:{quote(str(self.path.absolute()))}?mode=ro&immutable=1"
        line = 0
        try:
            with closing(sqlite3.connect(address, uri=True)) as database:
                # The file may come from elsewhere: code that its schema defines is not run.
                database.execute("PRAGMA trusted_schema = OFF")
                for name, sequence in database.execute("SELECT id, sequence FROM protein"):
                    line += 1
                    yield protein(self, line, self.text(name, line, "id"), sequence)
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path}: cannot be read as SQLite with a table protein(id, sequence) ({error}); "
                "copy or download it again"
            ) from None
        if not line:
            raise UserError(f"{self.path}: the table protein has no rows; give a file with data")


def protein(source: RowFile, line: int, name: str, sequence: object) -> Record:
    """Make the protein of a row; raise UserError when `sequence` holds no residues."""
    residues = residues_of(sequence, source.location(line), name) if isinstance(sequence, str) else b""
    if not residues:
        raise UserError(
            f"{source.location(line)}: the sequence of {name!r} is {shortened(sequence)}, not residues; "
            "complete or remove the row"
        )
    return Record(name, residues, line)
