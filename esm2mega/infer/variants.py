"""Describes variants of a protein, and reads and writes the tables that hold them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from esm2mega.data.readers.text import bounded_lines, open_text
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, refuse_stream, replacing
from esm2mega.vocabulary import STANDARD_RESIDUES, VOCAB

AMINO_ACIDS = "".join(sorted(VOCAB[i] for i in STANDARD_RESIDUES))
"""Lists the 20 standard residues in alphabetical order."""

STOP = "*"
"""Stands for the end of the protein in the place of a residue, as in ``A24*``."""

_DELIMITERS = ",\t;"


class Substitution(NamedTuple):
    """Says that residue `position` (from 0) of the wild type, `wild`, becomes `mutant`, maybe `STOP`."""

    position: int
    wild: str
    mutant: str


Variant = tuple[Substitution, ...]
"""Holds the residues that change; a variant without any is the wild type."""


def write_variant(variant: Variant, offset: int) -> str:
    """Write a variant in a form that `notation.parse_variant` reads."""
    return ":".join(f"{s.wild}{s.position + offset}{s.mutant}" for s in variant)


def single_substitutions(sequence: str) -> list[Variant]:
    """List the substitutions of every standard residue of the sequence by each of the 19 others, in order."""
    return [
        (Substitution(index, wild, mutant),)
        for index, wild in enumerate(sequence)
        if wild in AMINO_ACIDS
        for mutant in AMINO_ACIDS
        if mutant != wild
    ]


def apply(variant: Variant, sequence: str) -> str:
    """Return the sequence of the mutant, which ends before a stop."""
    letters = list(sequence)
    for substitution in variant:
        letters[substitution.position] = substitution.mutant
    return "".join(letters).partition(STOP)[0]


def ends_early(variant: Variant) -> bool:
    """Return whether the variant has a stop."""
    return any(substitution.mutant == STOP for substitution in variant)


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


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV, which appears under its name when it is complete.

    Raises:
        MachineError: The disk is full, or the path cannot be written.
    """
    with replacing(path, OTHER_OUT) as partial, partial.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
