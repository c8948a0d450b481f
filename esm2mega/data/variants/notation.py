"""Reads variants as tables write them: ``A24G``, ``A24G:D25N``, HGVS such as ``p.Ala24Gly``, and ``WT``.

| written | read as |
|---|---|
| ``A24G``, ``Ala24Gly``, ``p.Ala24Gly``, ``p.(Ala24Gly)``, ``NP_1.1:p.Ala24Gly`` | a substitution |
| ``A24G:D25N``, ``p.[Ala24Gly;Asp25Asn]`` | several, also with ``/ , ; +``, blanks or ``_`` between them |
| ``A24A``, ``A24=``, ``p.Ala24=`` | no change of the protein: the wild type |
| ``WT``, ``_wt``, ``_sy``, ``p.=`` | the wild type (the underscores are those of Enrich2 and MaveDB) |
| ``A24*``, ``A24Ter``, ``p.Ala24Ter`` | the protein ends before residue 24 |
"""

from __future__ import annotations

import re

from Bio.Data.IUPACData import protein_letters_3to1_extended

from esm2mega.data.variants.variant import STOP, Substitution, Variant
from esm2mega.errors import UserError
from esm2mega.vocabulary import VOCAB

_WILD_TYPE = frozenset({"WT", "_WT", "_SY", "WILDTYPE", "WILD-TYPE", "WILD TYPE", "WILD_TYPE", "="})
LETTER = {name.upper(): letter for name, letter in protein_letters_3to1_extended.items()} | {"TER": STOP}
"""Maps names of residues in three letters to those in one."""

_ACCESSION = re.compile(r"(?!P\.)([\w.-]+):(?=P\.)")
"""Matches the protein that HGVS may name before its changes."""

_CHANGE = re.compile(r"([A-Z]|[A-Z]{3})(-?[0-9]{1,9})([A-Z]|[A-Z]{3}|\*|=)")
_AMBIGUOUS = re.compile(r"[A-Z][0-9]+[A-Z]")
"""Matches A2M, a gene and a change."""

_BEGIN_OF_CHANGE = re.compile(r"([A-Z]|[A-Z]{3})-?\d+(?:_[A-Z]{1,3}-?\d+)?(?:DEL|INS|DUP|FS|EXT)")
"""Matches how the changes begin that are no substitutions."""

_BETWEEN = re.compile(r"\s*[:/,;+]\s*|\s+")
_OTHER_CHANGES = re.compile(r"\d(?:_[A-Z]{1,3}\d+)?(?:DEL|INS|DUP)|FS|EXT")


def parse_variant(text: str, sequence: str, offset: int, offset_name: str = "--offset") -> Variant:
    """Read one variant.

    Args:
        text: A variant in one of the forms above, in letters of either case.
        sequence: The wild type.
        offset: Number of its first residue.
        offset_name: What sets the offset, for messages; empty where it is fixed.

    Returns:
        The residues that change; none for the wild type.

    Raises:
        UserError: The text has another form, or a change is outside of the sequence, starts from a residue
            that the wild type does not have there, leads to no residue of ESM-2, occurs twice, or is behind a
            stop.
    """
    parts, is_hgvs = parts_of(text)
    if len(parts) == 1 and parts[0] in _WILD_TYPE:
        return ()
    cure = offset_cure(offset, offset_name)
    changes = [substitution_of(text, part, is_hgvs, sequence, offset, cure) for part in parts]
    if len({change.position for change in changes}) < len(changes):
        raise UserError(f"{text!r} changes a residue twice; give each residue once")
    end = min((change.position for change in changes if change.mutant == STOP), default=len(sequence))
    if any(change.position > end for change in changes):
        raise UserError(f"{text!r} changes a residue after a stop; leave that change out")
    return tuple(change for change in changes if change.mutant != change.wild)


def offset_cure(offset: int, name: str) -> str:
    """Return the end of a message on a wrong residue; `name` is what sets the offset, or empty."""
    return f", or set {name} (now {offset}) to the number of the first residue" if name else ""


def parts_of(text: str) -> tuple[list[str], bool]:
    """Return the changes of a variant in upper case, and whether they are HGVS.

    Raises:
        UserError: What stands before the changes may be one of them.
    """
    upper = text.strip().upper()
    if upper in _WILD_TYPE:
        return [upper], False
    accession = _ACCESSION.match(upper)
    if accession is not None and _AMBIGUOUS.fullmatch(accession[1]):
        raise UserError(
            f"{text!r}: {accession[1]} may be a change or the name of a protein; leave the name "
            "out, or write all changes in one form"
        )
    if accession is not None and not _is_change(accession[1]):
        upper = upper[accession.end() :]
    whole = _without_parentheses(upper.removeprefix("P."))
    if upper.startswith("P.") and whole.startswith("[") and whole.endswith("]"):
        return [_without_parentheses(part.strip()) for part in whole[1:-1].split(";")], True
    parts: list[str] = []
    is_hgvs = False
    for part in _BETWEEN.split(upper):
        if part.startswith("P."):
            is_hgvs = True
            parts.append(_without_parentheses(part[2:]))
        else:
            parts += _substitutions_of(part)
    return parts, is_hgvs


def _without_parentheses(part: str) -> str:
    """Take off the parentheses of a change that was predicted and not observed."""
    return part[1:-1] if part.startswith("(") and part.endswith(")") else part


def _substitutions_of(part: str) -> list[str]:
    """Return substitutions between underscores, which the ends of a deletion or insertion have too."""
    changes = part.split("_")
    return changes if all(map(_CHANGE.fullmatch, changes)) else [part]


def is_wild_type(text: str) -> bool:
    """Tell whether a text is one of the names of the wild type."""
    return parts_of(text)[0][0] in _WILD_TYPE


def _is_change(part: str) -> bool:
    """Tell whether a part names a residue and what becomes of it; SCN5A, a gene, does not."""
    match = _CHANGE.fullmatch(part) or _BEGIN_OF_CHANGE.match(part)
    return match is not None and (len(match[1]) == 1 or match[1] in LETTER)


def looks_like_variant(text: str) -> bool:
    """Tell whether a text has the form of changes, be they right or not."""
    try:
        return all(map(_is_change, parts_of(text)[0]))
    except UserError:
        return True


def is_indel(part: str) -> bool:
    """Tell whether a change looks like an insertion, deletion, frame shift or extension."""
    return _OTHER_CHANGES.search(part) is not None


def residue_at(part: str, letters: str, number: int, sequence: str, offset: int, cure: str) -> int:
    """Return the index of a residue that a change names; raise `UserError` if it is not that residue.

    Args:
        part: The change, for messages.
        letters: Name of the residue, in one letter or three.
        number: Its number.
        sequence: The wild type.
        offset: Number of its first residue.
        cure: End of messages.
    """
    index, name = number - offset, LETTER.get(letters, letters)
    if not 0 <= index < len(sequence):
        raise UserError(
            f"{part}: residue {number} is not in the sequence, whose {len(sequence)} residues are "
            f"numbered from {offset}; correct it{cure}"
        )
    if sequence[index] != name:
        raise UserError(
            f"{part}: residue {number} of the sequence is {sequence[index]}, not {name}; correct it{cure}"
        )
    return index


def substitution_of(
    text: str, part: str, is_hgvs: bool, sequence: str, offset: int, cure: str
) -> Substitution:
    """Read a substitution, `part` of the variant `text`; the rest is as for `residue_at`."""
    match = _CHANGE.fullmatch(part)
    names = [] if match is None else [LETTER.get(match[i], match[i]) for i in (1, 3)]
    if match is None or any(len(name) > 1 for name in names):
        if is_indel(part):
            raise UserError(
                f"{text!r} is no substitution; variants with insertions and deletions are scored as whole "
                "sequences, which a column mutated_sequence holds"
            )
        raise UserError(
            f"{text!r} is no variant; write A24G, A24G:D25N for several substitutions, p.Ala24Gly, or WT"
        )
    wild, mutant = names
    index = residue_at(part, match[1], int(match[2]), sequence, offset, cure)
    if match[3] == "X" and (is_hgvs or len(match[1]) > 1):
        raise UserError(f"{text!r}: X is a stop in old HGVS and any residue in new; write Ter or Xaa")
    if mutant == "=":
        mutant = wild
    if mutant not in VOCAB and mutant != STOP:
        raise UserError(f"{part}: {mutant} is no residue of ESM-2; the letters are {''.join(VOCAB[4:29])}")
    if mutant == STOP and index == 0:
        raise UserError(f"{text!r} leaves no residue of the protein, so there is nothing to score")
    return Substitution(index, wild, mutant)
