"""Reads tables in text form: CSV and its relatives with a header line, and JSON lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esm2mega.data.readers.base import LONGEST_TEXT, Block, ByteProgress, SourceOptions
from esm2mega.data.readers.columns import TableReader
from esm2mega.data.readers.text import TextSource
from esm2mega.errors import UserError
from esm2mega.files import parse_json

_DELIMITERS = ",\t;"
_HEADER_BYTES = 1 << 20


class _TextTable(TextSource, TableReader):
    """Reads a table that is text."""

    def __init__(
        self, path: str | Path, options: SourceOptions, progress: ByteProgress | None = None
    ) -> None:
        super().__init__(path, progress)
        self.options = options


class CsvReader(_TextTable):
    """Reads CSV with a header line; the delimiter is the comma, tab or semicolon that the header has most of.

    A field in double quotes may hold delimiters, line ends, and double quotes written twice. So a block ends
    at a line end behind an even number of quotes.
    """

    format_name = "CSV"
    too_long = "a row (is a double quote missing?)"

    def __init__(
        self, path: str | Path, options: SourceOptions, progress: ByteProgress | None = None
    ) -> None:
        """Read the header; raise UserError when a column is missing."""
        super().__init__(path, options, progress)
        with self._opened() as stream:
            header = self.decoded(Block(1, self._header_line(stream))).rstrip("\r\n")
        if "\r" in header:
            raise UserError(
                f"{self.location(1)}: has carriage returns without line feeds, as old Macs wrote; convert "
                "it, e.g. with `tr '\\r' '\\n'`"
            )
        self._delimiter = max(_DELIMITERS, key=header.count)
        try:
            names = next(csv.reader([header], delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            raise UserError(f"{self.location(1)}: not CSV ({error}); correct the header") from None
        self._find_columns([name.strip() for name in names], options)

    def rows(self, block: Block) -> Iterator[tuple[int, Mapping[str, Any]]]:
        text = self.decoded(block)
        # The library's limit of 128 KiB is shorter than some proteins; no field is longer than its block.
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))
        # newline="" keeps line ends inside quotes as they are.
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True)
        before = 0
        try:
            for row in rows:
                line, before = block.line + before, rows.line_num
                if not row:
                    continue
                if len(row) != len(self.columns):
                    raise UserError(
                        f"{self.location(line)}: has {len(row)} fields, the header has {len(self.columns)}; "
                        "put double quotes around a field that holds the delimiter"
                    )
                yield line, dict(zip(self.columns, row, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{self.location(block.line + before)}: not CSV ({error}); correct the row"
            ) from None

    def _start(self, stream: io.BufferedReader[Any]) -> tuple[bytes, int]:
        self._header_line(stream)
        line = 2
        while (start := stream.readline(_HEADER_BYTES)).isspace():
            line += start.endswith(b"\n")
        if not start:
            raise UserError(f"{self.path}: no rows under the header; give a table with sequences")
        return start, line

    def _last_cut(self, text: bytes) -> int:
        end = text.rfind(b"\n") + 1
        quotes = text.count(b'"', 0, end)
        while end and quotes % 2:
            before = text.rfind(b"\n", 0, end - 1) + 1
            quotes -= text.count(b'"', before, end)
            end = before
        return end

    def _header_line(self, stream: io.BufferedReader[Any]) -> bytes:
        header = stream.readline(_HEADER_BYTES)
        if header.startswith(b">"):
            cure = "give --format fasta, or rename the file"
            if self.options.set_by != "options":
                cure = "give the file a name that ends in .fasta"
            raise UserError(f"{self.path}: is FASTA, not CSV; {cure}")
        if b"\0" in header:
            raise UserError(f"{self.path}: is a binary file, not CSV")
        if not header.strip():
            raise UserError(f"{self.path}:1: no header; name the columns in the first line")
        return header


class JsonLinesReader(_TextTable):
    """Reads one JSON object per line."""

    format_name = "JSON lines"
    too_long = "a line"

    def __init__(
        self, path: str | Path, options: SourceOptions, progress: ByteProgress | None = None
    ) -> None:
        """Read the keys of the first object; raise UserError when one is missing."""
        super().__init__(path, options, progress)
        with self._opened() as stream:
            text, line = self._start(stream)
            if not text.endswith(b"\n"):
                text += stream.readline(LONGEST_TEXT)
            if len(text) > LONGEST_TEXT:
                raise self._too_long(line)
        self._find_columns(list(self._parse(text, line)), options, "key")

    def rows(self, block: Block) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line, text in enumerate(block.text.split(b"\n"), block.line):
            if not text.strip():
                continue
            row = self._parse(text, line)
            if self.sequence_column not in row or (self.id_column is not None and self.id_column not in row):
                missing = self.id_column if self.sequence_column in row else self.sequence_column
                raise UserError(
                    f"{self.location(line)}: no key {missing!r}, which the first object has; add it, or "
                    "remove the line"
                )
            yield line, row

    def _parse(self, text: bytes, line: int) -> dict[str, Any]:
        try:
            row = parse_json(text)
        except ValueError as error:
            cure = "write one object per line"
            if text.lstrip().startswith(b"["):
                cure = "turn the array into one object per line, e.g. with `jq -c '.[]'`"
            raise UserError(f"{self.location(line)}: not JSON ({error}); {cure}") from None
        if not isinstance(row, dict):
            cure = " (turn an array into lines, e.g. with `jq -c '.[]'`)" if isinstance(row, list) else ""
            raise UserError(f"{self.location(line)}: not a JSON object; write one object per line{cure}")
        return row

    def _start(self, stream: io.BufferedReader[Any]) -> tuple[bytes, int]:
        line = 1
        while (start := stream.readline(_HEADER_BYTES)).isspace():
            line += start.endswith(b"\n")
        if not start:
            raise UserError(f"{self.path}: no objects in the file; give one JSON object per line")
        return start, line

    def _last_cut(self, text: bytes) -> int:
        return text.rfind(b"\n") + 1
