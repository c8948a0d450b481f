"""Reads the other columns of a table of proteins, which are to stand beside the predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esm2mega.config.schema import DataConfig
from esm2mega.data.readers.columns import TableReader
from esm2mega.data.readers.settings import options_of
from esm2mega.data.readers.sources import open_source
from esm2mega.errors import UserError
from esm2mega.files import refuse_stream

ALL = "all"
"""Means every column but that of the ids."""

_OPTION = "--keep-columns"
_TAKEN = "input_"
"""Begins the name of a kept column if the predictions have a column of that name."""


class KeptColumns:
    """Gives the cells of chosen columns for each protein of a table, in its order.

    Attributes:
        names: The columns, in the order of the table.
    """

    def __init__(self, path: str, data: DataConfig, chosen: Sequence[str]) -> None:
        """Find the columns; rows are read later.

        Args:
            path: The table.
            data: How it is read.
            chosen: Names of columns, or `ALL` alone.

        Raises:
            UserError: It is no table, or has no such column.
        """
        self._path, self._data = path, data
        refuse_stream(path, f"{_OPTION}: {path}")
        source = self._open()
        others = [name for name in source.columns if name and name != source.id_column]
        if missing := [name for name in chosen if chosen != [ALL] and name not in others]:
            raise UserError(
                f"{_OPTION} {missing[0]}: {path} has no other column of this name; it has {', '.join(others)}"
            )
        self.names = others if list(chosen) == [ALL] else [name for name in others if name in chosen]
        self._next = 0
        self._rows: Iterator[tuple[str, Mapping[str, Any]]] = iter(())

    def _open(self) -> TableReader:
        source = open_source(self._path, options_of(self._data))
        if not isinstance(source, TableReader):
            raise UserError(f"{_OPTION}: {self._path} is no table and has no columns; leave the option out")
        return source

    def cells(self, number: int, protein: str, taken: Mapping[str, Any]) -> dict[str, str]:
        """Return the cells of a protein; those of one after the other are read in one pass.

        Args:
            number: Number of the protein, from 0.
            protein: Its id, with which the table is compared.
            taken: The columns of the predictions.
        """
        if number < self._next or not self._next:
            self._next, self._rows = 0, self._read()
        name: str | None = None
        cells: Mapping[str, Any] = {}
        while self._next <= number:
            name, cells = next(self._rows, (None, {}))
            self._next += 1
        if name != protein:
            raise UserError(
                f"{self._path}: was changed while it was predicted; predict it again with --overwrite"
            )
        return {self._free(key, taken): _plain(cells.get(key)) for key in self.names}

    def _free(self, key: str, taken: Mapping[str, Any]) -> str:
        """Return the name that a column gets beside the predictions."""
        name = key
        while name in taken or (name != key and name in self.names):
            name = f"{_TAKEN}{name}"
        return name

    def _read(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        source = self._open()
        for block in source.blocks():
            for line, cells in source.rows(block):
                yield str(source.name(line, cells)).strip(), cells


def _plain(cell: Any) -> str:
    """Return a cell as text, so that a column has one type, whatever its first rows hold."""
    if cell is None:
        return ""
    return json.dumps(cell) if isinstance(cell, (list, dict)) else str(cell)
