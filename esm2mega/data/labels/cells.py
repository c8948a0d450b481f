"""Reads one cell of a labelled table: text, a number, or a string or list with an entry per residue.

Every error is a `UserError` with the location of the cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized

import numpy as np
import numpy.typing as npt

from esm2mega.data.readers.base import MISSING_VALUES
from esm2mega.errors import UserError

LARGEST = 1e19
"""Is the largest magnitude of a label that is a number: the square of a larger one overflows fp32."""

Cells = Mapping[str, object]
"""This maps columns to the cells of a row."""


def text_of(cells: Cells, column: str, location: str) -> str:
    """Return a cell as text, which may not be empty."""
    value = cells[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{location}: the label in column {column!r} is empty; complete or remove the row")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{location}: the label {value!r} in column {column!r} is not text; write it as text")
    return str(value).strip()


def plain_number(value: object) -> float:
    """Return a value or its text as a number; raise `ValueError` for anything else.

    Python's underscores between digits are refused: in a table ``1_000`` is more likely a mistake than 1000.
    """
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def number_of(value: object, column: str, location: str) -> float:
    """Return a cell, or a word of it, as a number; NaN for a missing value."""
    if value is None or (isinstance(value, str) and value.strip() in MISSING_VALUES | {""}):
        return math.nan
    try:
        number = plain_number(value)
    except ValueError:
        raise UserError(
            f"{location}: {value!r} in column {column!r} is not a number; correct it, or leave it empty"
        ) from None
    if math.isinf(number):
        raise UserError(f"{location}: {value!r} in column {column!r} is not finite; leave it empty")
    if abs(number) > LARGEST:
        raise UserError(
            f"{location}: {value!r} in column {column!r} is beyond {LARGEST:g}, whose square is the largest "
            "that fp32 holds; correct it, scale the column, or take its logarithm"
        )
    return number


def numbers_of(cells: Cells, column: str, location: str, num_residues: int) -> npt.NDArray[np.float64]:
    """Return the numbers of a cell, one per residue, ``[L]``; the cell is a list or text of words."""
    value = cells[column]
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list):
        raise UserError(f"{location}: the labels in column {column!r} are {value!r}, not a list of numbers")
    check_length(words, num_residues, column, location)
    return np.array([number_of(word, column, location) for word in words], dtype=np.float64)


def classes_of(cells: Cells, column: str, location: str, num_residues: int) -> Sequence[str]:
    """Return the classes of a cell: a character for each residue, or a word for each."""
    text: Sequence[str] = text_of(cells, column, location)
    if len(text) != num_residues and len(words := str(text).split()) == num_residues:
        text = words
    check_length(text, num_residues, column, location)
    return text


def mask_of(cells: Cells, column: str | None, location: str, num_residues: int) -> npt.NDArray[np.bool_]:
    """Return which residues count, ``[L]``: those marked 1 in the column, or all without a column."""
    if column is None:
        return np.ones(num_residues, dtype=bool)
    text = text_of(cells, column, location)
    check_length(text, num_residues, column, location)
    check_marks(text, f"column {column!r}", location)
    return np.frombuffer(text.encode(), dtype=np.uint8) == ord("1")


def check_marks(text: str, where: str, location: str) -> None:
    """Refuse a mask with characters other than 0 and 1; `where` names the mask in the message."""
    if stray := set(text) - {"0", "1"}:
        raise UserError(f"{location}: {min(stray)!r} in {where}; a mask is made of 0 and 1")


def check_length(labels: Sized, num_residues: int, column: str, location: str) -> None:
    """Refuse a number of labels that is not one per residue."""
    if len(labels) != num_residues:
        raise UserError(
            f"{location}: {len(labels)} labels in column {column!r} for {num_residues} residues; "
            "give one for each"
        )
