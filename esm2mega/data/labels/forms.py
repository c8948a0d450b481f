"""Decides for a whole column whether its cells hold a character for each residue, or a word for each.

A cell alone does not tell: ``H C`` may be two words, or three characters one of which is a blank. So the
cells of all splits decide together, and what they decided goes into the checkpoint. A list tells by itself;
cells of that form may stand beside others.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Iterable, Set

from esm2mega.data.labels.lists import MARKS, is_list
from esm2mega.errors import UserError

CHARACTERS, WORDS, LISTS = "characters", "words", "lists"
"""These are the forms of a column: its text is read as one of the first two, or is always that of a list."""

NO_LABEL = frozenset({"-100", "null", "None", "nan", "NaN", "<NA>"})
"""These words stand for a residue without a class; ``-100`` does so in the Hugging Face world."""

SAID = {CHARACTERS: "a character for each residue", WORDS: "a word for each residue", LISTS: "lists"}
"""This says what a column holds, for messages."""


def column_form(
    column: str,
    cells: Iterable[tuple[str, object, int]],
    known: str | None = None,
    declared: Collection[str] = (),
) -> str:
    """Return the form of a column.

    Args:
        column: Name of the column.
        cells: Location, cell, and number of residues, of every row of every split.
        known: Form that the column had in training, or None if it is not known.
        declared: Classes that the user declared, which may be a blank or a sign.

    Raises:
        UserError: Some cells fit one form and some another.
    """
    unlikely = (MARKS | set(string.whitespace)) - set(declared)
    counts: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    for location, value, num_residues in cells:
        found = _form_of_cell(value, num_residues, unlikely)
        if found is not None:
            counts[found] += 1
            firsts.setdefault(found, location)
    if known not in (CHARACTERS, WORDS):
        texts = [form for form in firsts if form != LISTS]
        if not texts:
            return LISTS if counts[LISTS] else CHARACTERS
        known = max(texts, key=counts.__getitem__)
        place = f"at {firsts[known]}"
    else:
        place = "in training"
    other = WORDS if known == CHARACTERS else CHARACTERS
    if counts[other]:
        raise UserError(
            f"{firsts[other]}: holds {SAID[other]} in column {column!r}, which holds {SAID[known]} {place}; "
            "write all rows of all files alike"
        )
    return known


def _form_of_cell(value: object, num_residues: int, unlikely: Set[str]) -> str | None:
    """Return the one form in which a cell can be read, or None if it can be read in several or in none.

    Args:
        value: The cell.
        num_residues: Number of residues of the protein.
        unlikely: Characters that are hardly classes.
    """
    if isinstance(value, list):
        return LISTS
    if not isinstance(value, str):
        return None
    if len(value) == num_residues:
        # The word of a single residue may be one character.
        is_plain = num_residues > 1 and not unlikely & set(value)
        return CHARACTERS if is_plain and value not in NO_LABEL else None
    if is_list(value):
        return LISTS
    return WORDS if len(value.split()) == num_residues else None
