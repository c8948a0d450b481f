"""Reads rows of a sequence and its labels from tables, FASTA headers, and label files joined by id.

Labels may be given in three ways:

    table                 a column of sequences and columns of labels, or a `data_dir` of such tables
    FASTA                 labels as ``KEY=VALUE`` in the headers
    `task.label_file`     sequences in one file; labels in a table, or (of residues) in a second FASTA; by id

A `task.mask_file` is a FASTA with 0 and 1 in the place of residues, which is joined by id too. Where the
headers of labels say ``SET``, each split takes its own proteins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.config.task import RESIDUE_KINDS, masks_of
from esm2mega.data.labels.cells import Cells, check_marks
from esm2mega.data.labels.data_dir import data_dir_rows, is_data_dir
from esm2mega.data.labels.sets import SetFilter
from esm2mega.data.labels.tokenised import INPUT_IDS, tokens_of_ids
from esm2mega.data.readers.base import Record, SourceOptions, require_columns
from esm2mega.data.readers.columns import TableReader
from esm2mega.data.readers.fasta import FastaReader, attributes, check_blanks, read_entries
from esm2mega.data.readers.settings import options_of
from esm2mega.data.readers.sources import open_source
from esm2mega.errors import UserError

MASK_FILE = "task.mask_file"
"""This stands for the column of the mask where the mask comes from a file."""

_CORRECT = "correct task.target_columns or task.mask_column"

Row = tuple[str, str, npt.NDArray[np.uint8], Cells]
"""This holds location, id, residues as tokens, and cells by column."""


@dataclass(frozen=True)
class Table:
    """Holds the proteins of a file, or of a list, with the cells of their labels as they stand there.

    Attributes:
        path: Where the proteins come from, for messages.
        key: What the user calls it, such as ``data.train``.
        rows: All proteins, of which there is at least one.
        notes: What the user should know about how they were read.
    """

    path: Path
    key: str
    rows: list[Row]
    notes: list[str]


def read_table(path: str | Path, task: TaskConfig, data: DataConfig, key: str) -> Table:
    """Read every protein of a file, with the cells of its labels.

    Args:
        path: CSV, JSON lines, Parquet, Excel or FASTA file; or a data directory of Model Zoo.
        task: Columns, label and mask files.
        data: Columns of sequences and ids.
        key: Name of `path` for the user, such as ``data.train``.

    Raises:
        UserError: A file cannot be read, or lacks what another needs; names file, line and id.
    """
    notes: list[str] = []
    sets = SetFilter(key)
    path = Path(path)
    if task.label_file is not None:
        rows = _with_labels(_sequences(path, data), Path(task.label_file), task, data, sets, notes)
    else:
        rows = _rows(path, task, data, key, sets)
    if task.mask_file is not None:
        rows = _with_masks(rows, ResidueStrings(Path(task.mask_file), "marks"))
    columns = [*task.target_columns, *filter(None, masks_of(with_mask_file(task)))]
    found = [
        (location, name, tokens, _chosen(cells, columns, location)) for location, name, tokens, cells in rows
    ]
    if not found:
        of_set = " of this SET" if sets.num_others else ""
        raise UserError(f"{key}={path}: holds no proteins{of_set}; give a table with some")
    return Table(path, key, found, [*notes, *sets.notes(path)])


def limited(table: Table, data: DataConfig | None) -> Table:
    """Return the table with its first rows alone, as many as `data.limit` says."""
    most, total = None if data is None else data.limit, len(table.rows)
    if most is None or total <= most:
        return table
    note = f"the first {most} of {total} proteins of {table.key} are taken (data.limit={most})"
    return replace(table, rows=table.rows[:most], notes=[*table.notes, note])


def with_mask_file(task: TaskConfig) -> TaskConfig:
    """Return the section with the column in which `read_table` puts the masks of `task.mask_file`."""
    return task if task.mask_file is None else replace(task, mask_column=MASK_FILE)


def _chosen(cells: Cells, columns: Sequence[str], location: str) -> Cells:
    """Return the cells of some columns; the lines of a JSON file may lack some that the first one has."""
    for column in columns:
        if column not in cells:
            raise UserError(
                f"{location}: no key {column!r}, which the first object has; add it, or remove the line"
            )
    return {column: cells[column] for column in columns}


def _with_masks(rows: Iterator[Row], masks: ResidueStrings) -> Iterator[Row]:
    for location, name, tokens, cells in rows:
        mask = masks.of(name, len(tokens), location)
        check_marks(mask, f"the mask of {name!r}", masks.location(name))
        yield location, name, tokens, {**cells, MASK_FILE: mask}


def _rows(path: Path, task: TaskConfig, data: DataConfig, key: str, sets: SetFilter) -> Iterator[Row]:
    """Yield the proteins of a file that has their labels too."""
    required = _required_columns(task)
    if is_data_dir(path):
        return (
            (location, name, tokens_of_ids(cells, location), cells)
            for location, name, cells in data_dir_rows(path, required, data.id_column)
        )
    source = open_source(path, options_of(data))
    if isinstance(source, FastaReader):
        return _header_rows(source, required, sets)
    if not isinstance(source, TableReader):
        raise UserError(
            f"{key}={path}: labels are read from CSV, JSON lines, Parquet, Excel and FASTA; give such a "
            "file, made from TAPE's by `esm2mega prepare tape`, or labels in task.label_file"
        )
    require_columns(f"{key}={path}", source.columns, required, _CORRECT)
    return _table_rows(source)


def _required_columns(task: TaskConfig) -> list[str]:
    """Return the columns of labels, and of masks that are in the table."""
    return [*task.target_columns, *dict.fromkeys(filter(None, masks_of(task)))]


def _table_rows(source: TableReader) -> Iterator[Row]:
    for block in source.blocks():
        for line, cells in source.rows(block):
            location = source.location(line)
            if source.sequence_column == INPUT_IDS:
                yield location, str(source.name(line, cells)), tokens_of_ids(cells, location), cells
                continue
            record = source.record(line, cells)
            yield location, record.id, vocabulary.encode_residues(record.residues), cells


def _header_rows(source: FastaReader, required: Sequence[str], sets: SetFilter) -> Iterator[Row]:
    for block in source.blocks():
        for entry in source.entries(block):
            location = source.location(entry.line)
            marks = attributes(entry, location)
            for column in required:
                if column not in marks:
                    raise UserError(
                        f"{location}: the header of {entry.id!r} has no {column}=VALUE; add it, correct "
                        "task.target_columns, or give labels in task.label_file"
                    )
            check_blanks(entry, required, location)
            if not sets.keeps(marks, location, entry.id):
                continue
            cells = {column: marks[column] for column in required}
            yield location, entry.id, vocabulary.encode_residues(entry.text.encode()), cells


class ResidueStrings:
    """Reads strings with a character per residue from a FASTA file, and finds them by id."""

    def __init__(self, path: Path, what: str) -> None:
        """Read the FASTA file at `path`; `what` is what messages call the characters."""
        self.entries, self.reader = read_entries(path, labels=True)
        self._what = what

    def __len__(self) -> int:
        return len(self.entries)

    def location(self, name: str) -> str:
        """Say where the string of a protein stands, for messages."""
        return self.reader.location(self.entries[name].line)

    def of(self, name: str, num_residues: int, location: str) -> str:
        """Return the string of a protein, whose sequence stands at `location` in another file."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(
                f"{location}: no {self._what} of {name!r} in {self.reader.path}; complete that file, or "
                "remove the protein"
            )
        if len(entry.text) != num_residues:
            raise UserError(
                f"{self.location(name)}: {len(entry.text)} {self._what} of {name!r}, which has "
                f"{num_residues} residues; give one for each, which may not be a blank"
            )
        return entry.text


def _sequences(path: Path, data: DataConfig) -> Iterator[tuple[str, Record]]:
    """Yield location and record of each protein; labels are found by id, so no id may be repeated."""
    source = open_source(path, options_of(data))
    lines: dict[str, int] = {}
    for record in source:
        location = source.location(record.line)
        if (first := lines.setdefault(record.id, record.line)) != record.line:
            raise UserError(
                f"{location}: the id {record.id!r} is that of line {first} already; with task.label_file ids "
                "must differ"
            )
        yield location, record


def _with_labels(
    records: Iterator[tuple[str, Record]],
    path: Path,
    task: TaskConfig,
    data: DataConfig,
    sets: SetFilter,
    notes: list[str],
) -> Iterator[Row]:
    """Yield proteins joined by id with the labels of `path`."""
    source = open_source(path, _label_options(data))
    used = 0
    if isinstance(source, FastaReader):
        if task.kind not in RESIDUE_KINDS:
            raise UserError(
                f"task.label_file={path}: a FASTA of labels has one for each residue, task.kind={task.kind} "
                "needs another form; give a table with ids and labels"
            )
        if len(task.target_columns) > 1:
            raise UserError(
                f"task.label_file={path}: a FASTA of labels is one column, task.target_columns="
                f"{task.target_columns} names several; give a table with ids and labels"
            )
        (column,) = task.target_columns
        entries = ResidueStrings(path, "labels")
        total = len(entries)
        for location, record in records:
            tokens = vocabulary.encode_residues(record.residues)
            used += 1
            labels = entries.of(record.id, len(tokens), location)
            label_place = entries.location(record.id)
            if sets.keeps(attributes(entries.entries[record.id], label_place), label_place, record.id):
                yield label_place, record.id, tokens, {column: labels}
    else:
        table = _label_table(source, path, task, data)
        total = len(table)
        for location, record in records:
            if record.id not in table:
                raise UserError(
                    f"{location}: no labels of {record.id!r} in {path}; complete that table, or remove "
                    "the protein"
                )
            label_place, cells = table[record.id]
            used += 1
            yield label_place, record.id, vocabulary.encode_residues(record.residues), cells
    if used < total:
        notes.append(f"{total - used} of {total} labels in {path} are of other proteins")


def _label_options(data: DataConfig) -> SourceOptions:
    """Return options for a table of labels, in which the column of ids stands for that of sequences."""
    name = data.id_column or "id"
    return SourceOptions(sequence_column=name, id_column=name, set_by="keys")


def _label_table(
    source: object, path: Path, task: TaskConfig, data: DataConfig
) -> dict[str, tuple[str, Cells]]:
    """Return location and cells of each row by id."""
    if not isinstance(source, TableReader):
        raise UserError(f"task.label_file={path}: give CSV, JSON lines, Parquet, Excel or FASTA")
    required = _required_columns(task)
    require_columns(f"task.label_file={path}", source.columns, required, _CORRECT)
    table: dict[str, tuple[str, Cells]] = {}
    for block in source.blocks():
        for line, cells in source.rows(block):
            location, name = source.location(line), str(cells[data.id_column or "id"]).strip()
            if name in table:
                raise UserError(
                    f"{location}: the id {name!r} is at {table[name][0]} already; remove one of them"
                )
            table[name] = location, cells
    return table
