"""Describes variants of a protein as the residues that change."""

from __future__ import annotations

from typing import NamedTuple

from esm2mega.vocabulary import STANDARD_RESIDUES, VOCAB

AMINO_ACIDS = "".join(sorted(VOCAB[i] for i in STANDARD_RESIDUES))
"""Lists the 20 standard residues in alphabetical order."""

STOP = "*"
"""Stands for the end of the protein in the place of a residue, as in ``A24*``."""


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
