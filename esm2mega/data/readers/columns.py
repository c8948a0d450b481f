"""Reads proteins from rows with named cells, whatever the format of the table is."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from esm2mega.config.schema import DataConfig
from esm2mega.data.readers.base import (
    MISSING_VALUES,
    Block,
    Record,
    RecordSource,
    SourceOptions,
    check_id,
    require_columns,
    residues_of,
)
from esm2mega.data.variants.notation import looks_like_variant
from esm2mega.data.variants.sequences import mutated_sequence
from esm2mega.errors import UserError
from esm2mega.files import shortened

_VARIANTS = ("mutant", "mutants", "mutation", "mutations", "variant", "variants", "hgvs_pro", "aa_change")
"""Lists the names of columns of variants in the tables of the field, in lower case."""


class TableReader(RecordSource):
    """Reads a table, which `_find_columns` is called with when its columns are known.

    Attributes:
        columns: names of the columns, in the order of the file.
        sequence_column: column of the sequences, or of variants.
        id_column: column of the ids; None where they are numbers.
    """

    numbers = "line numbers"
    """Is what the ids are where no column holds them."""

    options: SourceOptions
    columns: Sequence[str]
    sequence_column: str
    id_column: str | None

    @abstractmethod
    def rows(self, block: Block) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the line of each row and all its cells by column."""

    def notes(self) -> list[str]:
        notes = []
        if self.options.wild_type is None and self.options.sequences_beside is not None:
            notes.append(f"{self.path}: has no column of variants, so {self.sequence_column!r} is read")
        if self.id_column is None:
            notes.append(f"{self.path}: has no 'id', so the ids are {self.numbers}")
        return notes

    def records(self, block: Block) -> Iterator[Record]:
        for line, cells in self.rows(block):
            yield self.record(line, cells)

    def record(self, line: int, cells: Mapping[str, Any]) -> Record:
        """Return the protein of a row."""
        return table_record(self, self.options, line, self.name(line, cells), cells[self.sequence_column])

    def name(self, line: int, cells: Mapping[str, Any]) -> Any:
        """Return the cell of the id, or the number of the row."""
        return line if self.id_column is None else cells[self.id_column]

    def _find_columns(self, columns: Sequence[str], options: SourceOptions, what: str = "column") -> None:
        """Set the attributes; `what` is the word of the format for a column."""
        variants, sequences = options.sequence_column, options.sequences_beside
        if sequences is not None and sequences in columns and not _may_be_variants(columns, variants):
            options = replace(options, sequence_column=sequences, wild_type=None)
        self.options, self.columns = options, columns
        self.sequence_column, self.id_column = find_columns(self.path, columns, options, what)

    def _reading(self) -> str:
        return repr((self.options, self.id_column)) + self.options.of_variants


def table_record(
    source: RecordSource, options: SourceOptions, line: int, name: object, sequence: object
) -> Record:
    """Make the record of a table's row; raise UserError for cells that hold no id or no sequence.

    Args:
        source: the table.
        options: `drop_empty`, and the names of the columns for messages.
        line: line, or row, of the record.
        name: cell of the id column; text or an integer.
        sequence: cell of the sequence column; text. White space in it is removed.
    """
    if options.wild_type is not None and name == sequence and _is_missing(sequence):
        name = line  # the id is the variant itself, of which the message below says that it is missing
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name.strip():
        setting = options.setting("id_column", "NAME")
        other = "" if setting is None else f", or name another column with {setting}"
        raise UserError(
            f"{source.location(line)}: the id {shortened(name)} is {_kind(name)}; give every row an id{other}"
        )
    name = check_id(source, line, name.strip())
    if _is_missing(sequence):
        if options.drop_empty:
            return Record(name, b"", line)
        shown = "is empty" if not sequence else f"{sequence!r} is a missing value"
        what = "sequence" if options.wild_type is None else "variant"
        leave_out = ", or leave such rows out with `esm2mega prepare fasta --drop-empty`"
        raise UserError(
            f"{source.location(line)}: the {what} of {name!r} {shown}; complete or remove the row"
            f"{leave_out if options.set_by == 'options' else ''}"
        )
    if not isinstance(sequence, str):
        setting = options.setting("sequence_column", "NAME")
        cure = "correct the row" if setting is None else f"name the column of sequences with {setting}"
        raise UserError(
            f"{source.location(line)}: {options.sequence_column!r} of {name!r} is {_kind(sequence)}, "
            f"not a sequence; {cure}"
        )
    if options.wild_type is not None:
        sequence = variant_at(source.location(line), sequence, options)
    elif options.set_by == "keys":
        refuse_variant(source.location(line), sequence, options.sequence_column)
    return Record(name, residues_of(sequence, source.location(line), name), line)


def refuse_variant(location: str, text: str, column: str) -> None:
    """Raise `UserError` for a variant in the place of a sequence, where no protein is named that it is of."""
    if looks_like_variant(text):
        raise UserError(
            f"{location}: {shortened(text)} is a variant, not a sequence; name its protein with "
            f"data.wild_type=FILE.fasta data.mutation_column={column}"
        )


def variant_at(location: str, text: str, options: SourceOptions) -> str:
    """Return the sequence of a variant of the wild type of `options`; errors name the location."""
    assert options.wild_type is not None
    try:
        return mutated_sequence(text, options.wild_type, options.first_residue)
    except UserError as error:
        raise UserError(f"{location}: {error}") from None


def _is_missing(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and cell.strip() in MISSING_VALUES | {""})


def find_columns(
    path: Path, available: Sequence[str], options: SourceOptions, what: str = "column"
) -> tuple[str, str | None]:
    """Return the names of the sequence column and the id column; None for the latter to use row numbers.

    Args:
        path: path of the table, for messages.
        available: names of its columns.
        options: the names that the user asked for.
        what: word of the format for a column.
    """
    if options.sequence_column != options.id_column:  # of a table of labels, ids stand for the sequences
        _require(path, available, options, "sequence_column", what)
    if options.id_column is not None:
        _require(path, available, options, "id_column", what)
        return options.sequence_column, options.id_column
    # Variants of one protein are good names of themselves.
    default = None if options.wild_type is None else options.sequence_column
    return options.sequence_column, "id" if "id" in available else default


def _may_be_variants(columns: Sequence[str], name: str) -> bool:
    """Return whether a table has the column of variants, or one that may be meant by it."""
    by_lower = [column.lower() for column in columns]
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return bool(near) or any(column in _VARIANTS for column in by_lower)


def _require(path: Path, available: Sequence[str], options: SourceOptions, setting: str, what: str) -> None:
    name: str = getattr(options, setting)
    by_lower = {column.lower(): column for column in available}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    if (cure := options.setting(setting, by_lower[near[0]] if near else "NAME")) is None:
        hint = f"rename {by_lower[near[0]]!r}" if near else "rename one of them"
    else:
        hint = f"did you mean {cure}?" if near else f"name one of them with {cure}"
        variants = next((by_lower[each] for each in _VARIANTS if each in by_lower), None)
        if "data.sequence_column=" in cure and variants is not None:
            column = "" if variants == DataConfig.mutation_column else f" data.mutation_column={variants}"
            hint = f"set data.wild_type=FILE.fasta{column} if {variants!r} holds variants of one protein"
    require_columns(str(path), available, [name], hint, what)


def _kind(value: object) -> str:
    if value is None or value == "":
        return "empty"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "blank" if isinstance(value, str) else f"of type {type(value).__name__}")
