"""Reads Parquet tables, one block for each row group; needs the extra `parquet`."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm2mega.data.readers.arrow import readable
from esm2mega.data.readers.base import LONGEST_TEXT, Block, ByteProgress, Record, RowSource, SourceOptions
from esm2mega.data.readers.columns import TableReader
from esm2mega.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

_BATCH_ROWS = 4096


class ParquetReader(RowSource, TableReader):
    """Reads the rows of a Parquet file; columns hold text, and ids may be integers."""

    numbers = "row numbers"

    def __init__(
        self, path: str | Path, options: SourceOptions, progress: ByteProgress | None = None
    ) -> None:
        """Read the schema; raise UserError when a column is missing or of another type."""
        super().__init__(path, progress)
        self._check_file(self.path, "Parquet")
        with open_parquet(self.path) as file:
            schema = file.schema_arrow
            self._find_columns(schema.names, options)
            # A table of labels has no sequences; its ids stand for them.
            integers = options.sequence_column == options.id_column
            self._check_type(self.sequence_column, schema.field(self.sequence_column).type, integers)
            if self.id_column is not None:
                self._check_type(self.id_column, schema.field(self.id_column).type, integers=True)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = [0, *itertools.accumulate(groups)]
        if not self._starts[-1]:
            raise UserError(f"{self.path}: has no rows; give a table with sequences")

    def records(self, block: Block) -> Iterator[Record]:
        columns = [self.sequence_column, *filter(None, [self.id_column])]
        for line, cells in self.rows(block, list(dict.fromkeys(columns))):
            yield self.record(line, cells)

    def rows(
        self, block: Block, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the number of each row and its cells by column; bytes become text, also in lists.

        Args:
            block: the rows to read.
            columns: the columns to read; None for all.
        """
        columns, row = list(self.columns if columns is None else columns), block.line
        with open_parquet(self.path) as file:
            # Empty groups begin at the same row as the group behind them, so take the rightmost.
            group = bisect.bisect_right(self._starts, block.line - 1) - 1
            check_sizes(self.path, file, columns, group, block.line)
            for batch in file.iter_batches(_BATCH_ROWS, [group], columns, use_threads=False):
                for cells in batch.to_pylist():
                    yield row, {name: _text(cell) for name, cell in cells.items()}
                    row += 1
        check_rows(self.path, row - 1, self._starts[group + 1])

    def _ranges(self) -> list[tuple[int, int]]:
        return [(a, b) for a, b in zip(self._starts, self._starts[1:], strict=False) if b > a]

    def _check_type(self, column: str, found: pyarrow.DataType, integers: bool) -> None:
        import pyarrow.types as kinds

        if kinds.is_dictionary(found):
            found = found.value_type
        text = [kinds.is_string, kinds.is_large_string, kinds.is_string_view]
        text += [kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view]
        if any(is_kind(found) for is_kind in text) or (integers and kinds.is_integer(found)):
            return
        setting = self.options.setting("id_column" if integers else "sequence_column", "NAME")
        cure = "make it text" if setting is None else f"name another with {setting}"
        raise UserError(f"{self.path}: the column {column!r} holds {found}, not text; {cure}")


def check_sizes(
    path: Path, file: pyarrow.parquet.ParquetFile, columns: Sequence[str], group: int, first: int
) -> None:
    """Refuse a row group whose cells are larger than those of text may be, before they are decompressed.

    Args:
        path: path of the file, for messages.
        file: the file.
        columns: names of the columns that are read.
        group: number of the row group.
        first: number of its first row.
    """
    metadata = file.metadata.row_group(group)
    if metadata.total_byte_size <= LONGEST_TEXT * max(metadata.num_rows, 1):
        return  # pyarrow aborts the process where it looks at a column of damaged metadata
    for number in range(metadata.num_columns):
        chunk = metadata.column(number)
        size = chunk.total_uncompressed_size // max(metadata.num_rows, 1)
        name = chunk.path_in_schema.split(".")[0]
        if name in columns and size > LONGEST_TEXT:
            last = first + metadata.num_rows - 1
            raise UserError(
                f"{path}: rows {first} to {last} take {size >> 20} MiB each in {name!r}, the limit is "
                f"{LONGEST_TEXT >> 20}; remove or cut them"
            )


def check_rows(path: Path, found: int, expected: int) -> None:
    """Refuse a file of which pyarrow reads other rows than there are, as it does where a page is damaged."""
    if found != expected:
        raise UserError(
            f"{path}: is damaged: {found} rows can be read where its metadata say {expected}; copy or make "
            "it again"
        )


@contextmanager
def open_parquet(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open the file, for its schema and for batches of rows.

    Raises:
        UserError: pyarrow is not installed, or the file turns out, anywhere in the block, to be damaged.
    """
    with (
        readable(path, "Parquet", "parquet", "copy or make it again") as parquet,
        parquet.ParquetFile(path, memory_map=True) as file,
    ):
        yield file


def _text(cell: object) -> object:
    """Return bytes, also in a list, as text: some programs write text without saying that it is text."""
    if isinstance(cell, list) and any(isinstance(entry, bytes) for entry in cell):
        return [_text(entry) for entry in cell]
    return cell.decode("utf-8", errors="surrogateescape") if isinstance(cell, bytes) else cell
