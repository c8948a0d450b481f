"""Reads the proteins whose variants are scored."""

from __future__ import annotations

from typing import NamedTuple

from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.sources import open_source
from esm2mega.errors import UserError
from esm2mega.vocabulary import UNKNOWN_BYTES


class WildType(NamedTuple):
    """Holds a protein whose variants are scored."""

    id: str
    sequence: str


def clean(sequence: str) -> str:
    """Put a sequence as it was typed into upper case, without white space.

    Raises:
        UserError: The sequence is empty, or has a character that is no residue of ESM-2.
    """
    result = "".join(sequence.split()).upper()
    stray = sorted({letter for letter in result if not letter.isascii() or ord(letter) in UNKNOWN_BYTES})
    if stray or not result:
        problem = f"holds {', '.join(map(repr, stray))}, which ESM-2 does not know" if stray else "is empty"
        raise UserError(f"the sequence {problem}; give residues in one-letter code")
    return result


def read_wild_types(path: str) -> list[WildType]:
    """Read the proteins of a file in any format of `esm2mega.data.readers.sources`; ids must differ."""
    source = open_source(path, SourceOptions(set_by="nothing"))
    proteins = []
    for record in source:
        try:
            proteins.append(WildType(record.id, clean(record.residues.decode("ascii"))))
        except UserError as error:
            raise UserError(f"{source.location(record.line)}: {error}") from None
    if len({protein.id for protein in proteins}) < len(proteins):
        raise UserError(f"{path}: ids repeat, so variants cannot be told apart; give each protein its own id")
    return proteins
