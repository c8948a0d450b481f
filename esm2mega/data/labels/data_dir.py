"""Reads data directories of Cerebras Model Zoo: CSV files of token ids and labels, which ``meta.dat`` lists.

Each line of ``meta.dat`` is the name of a file in the directory and its number of rows. The label of a
protein stands in ``labels``, or in ``label``, as its documentation says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from esm2mega.config.task import DATA_DIR_LIST
from esm2mega.data.labels.cells import Cells
from esm2mega.data.labels.tokenised import ATTENTION_MASK, INPUT_IDS
from esm2mega.data.readers.base import SourceOptions, require_columns
from esm2mega.data.readers.tables import CsvReader
from esm2mega.errors import UserError

LABEL_COLUMNS = ("labels", "label")

_LARGEST_META = 16 << 20
_MOST_DIGITS = 18


def is_data_dir(path: Path) -> bool:
    """Tell whether a path is such a directory."""
    return (path / DATA_DIR_LIST).is_file()


def data_dir_rows(
    directory: Path, columns: Sequence[str], id_column: str | None
) -> Iterator[tuple[str, str, Cells]]:
    """Yield location, id and cells of each row, in the order of ``meta.dat``.

    A single column of labels that the files do not have is filled from the one that they have.

    Args:
        directory: The directory.
        columns: Columns of labels that must be there.
        id_column: Column of the ids; None for ``id`` where there is one and else the number of the row.

    Raises:
        UserError: ``meta.dat`` or a file of it is not as described above.
    """
    number = 0
    for path, expected in _files(directory):
        reader = CsvReader(path, SourceOptions(None, INPUT_IDS, id_column, set_by="nothing"))
        ids = id_column or ("id" if "id" in reader.columns else None)
        renamed = _renamed(columns, reader.columns)
        required = [ATTENTION_MASK, *(renamed.get(column, column) for column in columns)]
        require_columns(str(path), reader.columns, required, "is this a data_dir of Model Zoo?")
        found = 0
        for block in reader.blocks():
            for line, cells in reader.rows(block):
                found, number = found + 1, number + 1
                named = {column: cells[source] for column, source in renamed.items()}
                name = str(number) if ids is None else cells[ids].strip()
                yield reader.location(line), name, {**cells, **named}
        if found != expected:
            raise UserError(
                f"{path}: has {found:,} rows, {directory / DATA_DIR_LIST} says {expected:,}; copy both again"
            )


def _renamed(columns: Sequence[str], available: Sequence[str]) -> dict[str, str]:
    """Return the column of the files that stands for the one that is asked for, if it has another name."""
    if len(columns) != 1 or columns[0] in available:
        return {}
    found = next((name for name in LABEL_COLUMNS if name in available), None)
    return {} if found is None else {columns[0]: found}


def _files(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files that ``meta.dat`` lists, and the number of rows that it states for each."""
    meta = directory / DATA_DIR_LIST
    if meta.stat().st_size > _LARGEST_META:
        raise UserError(f"{meta}: is too large for a list of files; is this a data_dir of Model Zoo?")
    for number, line in enumerate(meta.read_text(errors="replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdecimal() or len(words[1]) > _MOST_DIGITS:
            raise UserError(f"{meta}:{number}: is {line[:60]!r}, not the name of a file and its rows")
        name = PurePosixPath(words[0])
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{meta}:{number}: refused: {words[0][:60]} leads outside the directory")
        path = directory / name
        if not os.path.isfile(path):  # not an error of a name that no file can have
            raise UserError(
                f"{meta}:{number}: names {words[0][:60]}, which is missing; copy the whole directory"
            )
        yield path, int(words[1])
