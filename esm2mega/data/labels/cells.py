"""Reads one cell of a labelled table: text, a number, names, or a label for each residue.

Labels of residues are lists, or text in one of three forms: a character for each residue, a word for each, or
a list as other programs write it (`esm2mega.data.labels.lists`). Every error is a `UserError` with the
location of the cell.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sized

import numpy as np
import numpy.typing as npt

from esm2mega.data.labels.forms import CHARACTERS, NO_LABEL, WORDS
from esm2mega.data.labels.lists import MARKS, is_list, list_of
from esm2mega.data.labels.numbers import PLAIN, cure, read_number
from esm2mega.data.readers.base import MISSING_VALUES
from esm2mega.errors import UserError
from esm2mega.files import shortened

LARGEST = 1e19
"""Is the largest magnitude of a label that is a number: the square of a larger one overflows fp32."""

Cells = Mapping[str, object]
"""This maps columns to the cells of a row."""


def text_of(cells: Cells, column: str, location: str) -> str:
    """Return a cell as text, which may not be empty."""
    value = cells[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _empty(column, location)
    if isinstance(value, list) or (isinstance(value, str) and value.strip()[0] == "[" and is_list(value)):
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} is a list, not one class; give one, or set "
            "task.kind=multilabel, or token_classification for a class per residue"
        )
    if isinstance(value, bool):
        # As spreadsheets write it, so that the same table has the same classes as CSV.
        return str(value).upper()
    if not isinstance(value, (str, int)):
        raise UserError(
            f"{location}: the label {shortened(value)} in column {column!r} is not text; write it as text"
        )
    return str(value).strip()


def number_of(value: object, column: str, location: str, written: str = PLAIN) -> float:
    """Return a cell, or a word of it, as a number; NaN for a missing value.

    Args:
        value: The cell.
        column: Its column, for messages.
        location: Where its row is, for messages.
        written: How numbers are written, see `esm2mega.data.labels.numbers`.
    """
    if value is None or (isinstance(value, str) and value.strip() in MISSING_VALUES | {""}):
        return math.nan
    try:
        number = read_number(value, written)
    except ValueError:
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} is not a number; {cure(value, written)}"
        ) from None
    if math.isinf(number):
        raise UserError(f"{location}: {shortened(value)} in column {column!r} is not finite; leave it empty")
    if abs(number) > LARGEST:
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} is beyond {LARGEST:g}, whose square is the "
            "largest that fp32 holds; correct it, scale the column, or take its logarithm"
        )
    return number


def numbers_of(
    cells: Cells, column: str, location: str, num_residues: int, written: str = PLAIN
) -> npt.NDArray[np.float64]:
    """Return the numbers of a cell, ``[L]``: of a list, its text, or of words, one for each residue."""
    value = cells[column]
    if isinstance(value, str) and written != PLAIN and value.strip()[:1] not in ("[", "("):
        value = value.replace(";", " ").split()
    if isinstance(value, str) and "," in value and _is_number(value.replace(",", ".")):
        raise UserError(
            f"{location}: {value!r} in column {column!r} may be two numbers, or one with a decimal comma; "
            "write [0, 5] or 0.5, or set data.numbers=decimal_comma"
        )
    if isinstance(value, str):
        value = _listed(value, column, location) if is_list(value) else value.split()
    if not isinstance(value, list):
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} is not a list of numbers; give one for "
            "each residue, nan for none"
        )
    check_length(value, num_residues, column, location)
    return np.array([number_of(word, column, location, written) for word in value], dtype=np.float64)


def classes_of(
    cells: Cells, column: str, location: str, num_residues: int, form: str, declared: Collection[str] = ()
) -> list[str | None]:
    """Return the classes of a cell, one per residue, and None for residues without a label.

    Args:
        cells: Row of the table.
        column: Column of the cell.
        location: Where the row is, for messages.
        num_residues: Number L of residues of the protein.
        form: How text that is no list is read, from `esm2mega.data.labels.forms`.
        declared: Classes that the user declared. They alone may be blank, or hold brackets, quotes, commas or
            blanks.
    """
    value = cells[column]
    if value is None or value == "":
        raise _empty(column, location)
    if isinstance(value, str) and not (form == CHARACTERS and len(value) == num_residues) and is_list(value):
        value = _listed(value, column, location)
    if isinstance(value, str) and form == CHARACTERS:
        check_length(value, num_residues, column, location)
        if value in NO_LABEL and not set(value) <= set(declared):
            raise UserError(
                f"{location}: {value!r} in column {column!r} is a missing value, not a character for each "
                "residue; complete or remove the row"
            )
        for character in (set(value) & MARKS | set(filter(str.isspace, set(value)))) - set(declared):
            raise UserError(
                f"{location}: {character!r} at residue {value.index(character)} in column {column!r}, which "
                "holds a character for each residue; write another one, or declare it as a class with "
                "task.classes"
            )
        return list(value)
    if isinstance(value, str) and (form == WORDS or num_residues == 1):
        value = value.split()
    if not isinstance(value, list):
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} is no list, as other cells are; give a "
            "list with an entry for each residue"
        )
    check_length(value, num_residues, column, location)
    # Entries of different types may be equal, such as 1 and true.
    typed = [(type(entry), entry) for entry in value]
    if not all(isinstance(entry, _ENTRIES) for entry in value):
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} holds entries that are no text, number or "
            "null; give a class for each residue"
        )
    names = {key: _class_of(key[1], column, location, declared) for key in set(typed)}
    return [names[key] for key in typed]


_ENTRIES = (str, int, float, type(None))


def _class_of(entry: object, column: str, location: str, declared: Collection[str]) -> str | None:
    """Return the class that an entry of a list, or a word, stands for; None for no label."""
    if entry is None or (isinstance(entry, float) and math.isnan(entry)):
        return None
    if isinstance(entry, float):
        if not entry.is_integer():
            raise UserError(
                f"{location}: {entry} in column {column!r} is no class; give whole numbers or text, or set "
                "task.kind=token_regression"
            )
        entry = int(entry)
    name = str(entry)
    if name in declared:
        return name
    name = name.strip()
    if name in NO_LABEL:
        return None
    if not name or MARKS & set(name) or len(name.split()) > 1:
        shown = shortened(str(entry))
        what = "holds blanks, brackets, quotes or commas" if name else "is blank"
        raise UserError(
            f"{location}: the class {shown} in column {column!r} {what}; write another word, null for no "
            "label, or declare it with task.classes"
        )
    return name


def names_of(cells: Cells, column: str, location: str) -> list[str]:
    """Return the names in a cell of a multilabel task: a list of text, or text with ``;`` between names."""
    value = cells[column]
    if value is None:
        return []
    if isinstance(value, str):
        text = value.strip()
        if ";" in text or not is_list(text) or (text[0] == "(" and "," not in text and text != "()"):
            return [name.strip() for name in text.split(";") if name.strip()]
        if text[0] not in "[(":
            raise UserError(
                f"{location}: {shortened(text)} in column {column!r} has commas; write names with ; between, "
                "and a ; after a name that has a comma"
            )
        value = _listed(text, column, location, bare_text=False)
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} is no list of names; write names as text, "
            "or give a column of 0 and 1 for each label"
        )
    for name in value:
        if ";" in name:
            raise UserError(
                f"{location}: the name {name!r} in column {column!r} holds a ; which separates "
                "names; write another sign"
            )
    return [name.strip() for name in value]


def mask_of(cells: Cells, column: str | None, location: str, num_residues: int) -> npt.NDArray[np.bool_]:
    """Return which residues count, ``[L]``: those marked 1 in the column, or all without a column."""
    if column is None:
        return np.ones(num_residues, dtype=bool)
    value = cells[column]
    if value is None or value == "":
        raise _empty(column, location)
    if isinstance(value, str) and len(value) != num_residues:
        if is_list(value):
            value = _listed(value, column, location)
        elif len(words := value.split()) == num_residues:
            value = words
    if not isinstance(value, (str, list)):
        raise UserError(
            f"{location}: {shortened(value)} in column {column!r} is no mask; write 0 or 1 for each residue, "
            "as text or as a list"
        )
    check_length(value, num_residues, column, location)
    marks = value if isinstance(value, str) else [_mark(entry) for entry in value]
    check_marks(marks, f"column {column!r}", location)
    return np.frombuffer("".join(marks).encode(), dtype=np.uint8) == ord("1")


def _mark(entry: object) -> str:
    """Return an entry of a mask as text."""
    return str(int(entry)) if isinstance(entry, (bool, float)) and entry in (0, 1) else str(entry)


def check_marks(marks: Collection[str], where: str, location: str) -> None:
    """Refuse a mask with anything but 0 and 1; `where` names the mask in the message."""
    if stray := set(marks) - {"0", "1"}:
        raise UserError(f"{location}: {shortened(min(stray))} in {where}; a mask is made of 0 and 1")


def check_length(labels: Sized, num_residues: int, column: str, location: str) -> None:
    """Refuse a number of labels that is not one per residue."""
    if len(labels) != num_residues:
        raise UserError(
            f"{location}: {len(labels)} labels in column {column!r} for {num_residues} residues; "
            "give one for each"
        )


def _listed(text: str, column: str, location: str, bare_text: bool = True) -> list[object]:
    try:
        return list_of(text, bare_text)
    except ValueError as error:
        raise UserError(
            f"{location}: the list {shortened(text)} in column {column!r} {error}; write it as JSON, such as "
            '["C", "H"] or [0, 1]'
        ) from None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _empty(column: str, location: str) -> UserError:
    return UserError(f"{location}: the label in column {column!r} is empty; complete or remove the row")
