"""Reads substitutions such as ``A24G`` or ``A24G:D25N``, and the tables that hold them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from esm2mega.data.readers.text import open_text
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, refuse_stream, replacing
from esm2mega.vocabulary import STANDARD_RESIDUES, VOCAB

AMINO_ACIDS = "".join(sorted(VOCAB[i] for i in STANDARD_RESIDUES))
"""Lists the 20 standard residues in alphabetical order."""

_SUBSTITUTION = re.compile(r"([A-Z])(-?\d+)([A-Z])")
_DELIMITERS = ",\t;"


class Substitution(NamedTuple):
    """Says that residue `position` (from 0) of the wild type, `wild`, becomes `mutant`."""

    position: int
    wild: str
    mutant: str


Variant = tuple[Substitution, ...]


def parse_variant(text: str, sequence: str, offset: int) -> Variant:
    """Read one variant.

    Args:
        text: Substitutions with colons between them, in letters of either case.
        sequence: The wild type.
        offset: Number of its first residue.

    Raises:
        UserError: The text has another form, or a substitution is outside of the sequence, starts from a
            residue that the wild type does not have there, leads to no residue of ESM-2, or occurs twice.
    """
    variant = []
    for part in text.strip().upper().split(":"):
        match = _SUBSTITUTION.fullmatch(part)
        if match is None:
            raise UserError(f"{text!r} is no variant; write A24G, or A24G:D25N for several substitutions")
        wild, number, mutant = match[1], int(match[2]), match[3]
        index = number - offset
        if not 0 <= index < len(sequence):
            raise UserError(
                f"{part}: residue {number} is not in the sequence, whose {len(sequence)} residues are "
                f"numbered from {offset}; set --offset to the number of the first one"
            )
        if sequence[index] != wild:
            raise UserError(
                f"{part}: residue {number} of the sequence is {sequence[index]}, not {wild}; correct it, or "
                f"set --offset (now {offset}) to the number of the first residue"
            )
        if mutant not in VOCAB:
            raise UserError(
                f"{part}: {mutant} is no residue of ESM-2; the letters are {''.join(VOCAB[4:29])}"
            )
        variant.append(Substitution(index, wild, mutant))
    if len({substitution.position for substitution in variant}) < len(variant):
        raise UserError(f"{text!r} substitutes a residue twice; give each residue once")
    return tuple(variant)


def write_variant(variant: Variant, offset: int) -> str:
    """Write a variant in the form that `parse_variant` reads."""
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
    """Return the sequence of the mutant."""
    letters = list(sequence)
    for substitution in variant:
        letters[substitution.position] = substitution.mutant
    return "".join(letters)


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
            header = stream.readline()
            delimiter = max(_DELIMITERS, key=header.count)
            reader = csv.reader(chain([header], stream), delimiter=delimiter, strict=True)
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
