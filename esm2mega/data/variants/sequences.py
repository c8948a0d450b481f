"""Makes the sequence of a variant: of substitutions, of insertions and deletions, or as the cell holds it.

| written | read as |
|---|---|
| all forms of `esm2mega.data.variants.notation` | substitutions, the wild type, an early end |
| ``K23del``, ``p.Lys23del``, ``p.Lys23_Val25del`` | residues that are missing |
| ``p.Lys23_Ala24insGlySer``, ``K23_A24insGS`` | residues inserted between two neighbours |
| ``p.Lys23_Val25delinsTrp``, ``p.Lys23delinsTrpGly`` | residues in the place of others |
| ``p.Lys23dup``, ``p.Lys23_Val25dup`` | residues that stand twice |
| ``A24G:K30del``, ``p.[Ala24Gly;Lys30del]`` | several of them, which do not touch the same residue |
| ``MKTAYIA…``, ``MKTAYIA…*`` | the whole sequence of the variant |
"""

from __future__ import annotations

import re

from esm2mega.data.variants.notation import (
    LETTER,
    is_indel,
    is_wild_type,
    offset_cure,
    parse_variant,
    parts_of,
    residue_at,
    substitution_of,
)
from esm2mega.data.variants.variant import STOP, apply
from esm2mega.errors import UserError
from esm2mega.vocabulary import VOCAB

_INDEL = re.compile(
    r"([A-Z]|[A-Z]{3})(-?[0-9]{1,9})(?:_([A-Z]|[A-Z]{3})(-?[0-9]{1,9}))?(DELINS|DEL|INS|DUP)([A-Z]*)"
)

_OFFSET_NAME = "data.first_residue"


def mutated_sequence(text: str, wild: str, offset: int = 1) -> str:
    """Return the sequence of a variant of a protein.

    Args:
        text: The variant, in one of the forms above.
        wild: The protein.
        offset: Number of its first residue.

    Raises:
        UserError: The text has none of the forms above, or does not fit the wild type.
    """
    text = text.strip()
    if (residues := text.removesuffix(STOP)).isalpha() and not is_wild_type(residues):
        return _whole(residues, wild)
    parts, is_hgvs = parts_of(text)
    found = [_INDEL.fullmatch(part) for part in parts]
    for part, match in zip(parts, found, strict=True):
        if match is None and is_indel(part):
            raise UserError(
                f"{text!r}: {part} is no substitution, deletion, insertion or duplication with all residues "
                "named; write the whole sequence of the variant in its place"
            )
    if not any(found):
        return apply(parse_variant(text, wild, offset, _OFFSET_NAME), wild)
    edits = []
    for part, match in zip(parts, found, strict=True):
        if match is not None:
            edits.append(_indel(part, match, wild, offset))
            continue
        change = substitution_of(text, part, is_hgvs, wild, offset, offset_cure(offset, _OFFSET_NAME))
        end = len(wild) if change.mutant == STOP else change.position + 1
        edits.append((change.position, end, change.mutant.replace(STOP, "")))
    return _edited(text, sorted(edits), wild)


def _whole(text: str, wild: str) -> str:
    """Return a cell that is a sequence itself, unless it is too short for a variant of the wild type."""
    if 2 * len(text) < len(wild):
        raise UserError(
            f"{text!r} is no variant such as A24G, and with less than half of the {len(wild)} residues of "
            "data.wild_type it is not taken for a sequence; correct it"
        )
    return text.upper()


def _indel(part: str, match: re.Match[str], wild: str, offset: int) -> tuple[int, int, str]:
    """Return begin and end of the residues that are replaced, and what replaces them."""
    cure = offset_cure(offset, _OFFSET_NAME)
    first_name, first, last_name, last, kind, inserted = match.groups()
    begin = residue_at(part, first_name, int(first), wild, offset, cure)
    end = begin + 1
    if last is not None:
        end = 1 + residue_at(part, last_name, int(last), wild, offset, cure)
        if end < begin + 2:
            raise UserError(f"{part}: ends before it begins; write the residue of the lower number first")
    if kind in ("DEL", "DUP") and inserted:
        raise UserError(f"{part}: names residues after {kind.lower()}; leave them out")
    if kind in ("INS", "DELINS") and not inserted:
        raise UserError(f"{part}: names no residues that are inserted; add them")
    letters = _letters(part, inserted, in_three=len(first_name) == 3)
    if kind == "INS":
        if end != begin + 2:
            raise UserError(
                f"{part}: residues are inserted between two neighbours, as in K23_A24insGS; correct it"
            )
        return begin + 1, begin + 1, letters
    if kind == "DUP":
        return end, end, wild[begin:end]
    return begin, end, letters


def _edited(text: str, edits: list[tuple[int, int, str]], wild: str) -> str:
    pieces, done = [], 0
    for number, (begin, end, letters) in enumerate(edits):
        if begin < done or (number and edits[number - 1][:2] == (begin, end)):
            raise UserError(f"{text!r} changes a residue twice; give each residue once")
        pieces += [wild[done:begin], letters]
        done = end
    result = "".join([*pieces, wild[done:]])
    if not result:
        raise UserError(f"{text!r} leaves no residue of the protein; correct it")
    return result


def _letters(part: str, inserted: str, in_three: bool) -> str:
    """Return inserted residues in one-letter code; they are written as the residues beside them are."""
    names = [inserted[i : i + 3] for i in range(0, len(inserted), 3)] if in_three else list(inserted)
    letters = [LETTER.get(name, name) for name in names]
    for name, letter in zip(names, letters, strict=True):
        if letter not in VOCAB or len(letter) > 1:
            raise UserError(f"{part}: {name} is no residue of ESM-2; the letters are {''.join(VOCAB[4:29])}")
    return "".join(letters)
