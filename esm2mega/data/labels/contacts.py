"""Computes contacts of residues from coordinates, by the definitions of TAPE and ESM.

Two residues are in contact if their atoms are less than 8 Angstrom apart: C-alpha in TAPE, C-beta in ESM. The
user chooses whose coordinates to give. Pairs nearer than 6 residues along the chain do not count: nearly all
of them are in contact.

A protein of ``l`` residues has ``p = l (l - 1) / 2`` pairs i < j, in the order (0, 1), (0, 2), …, (1, 2), ….
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt

from esm2mega.errors import UserError
from esm2mega.files import parse_json, shortened
from esm2mega.pairs import pairs_of

DISTANCE = 8.0
"""Pairs nearer than this, in Angstrom, are contacts.

TAPE (`tape/datasets.py`) and ESM (`examples/contact_prediction.ipynb`) agree on the number.
"""

SEPARATION = 6
"""Only pairs with at least this j - i count, in TAPE and in ESM."""

_FARTHEST = 1e6
"""Is the largest magnitude of a coordinate, in Angstrom; no structure is larger."""

Array = npt.NDArray[np.float64]

# Python writes tuples and None where JSON has lists and null.
_BRACKETS = str.maketrans("()", "[]")
_MISSING = re.compile(r"\b(None|nan)\b")


def read_coordinates(value: object, column: str, location: str) -> Array:
    """Read coordinates, ``[L, 3]``, from a cell: a list of three numbers for each residue, or its text.

    A residue without coordinates is null, or has null or NaN among its numbers; it becomes three NaN.

    Raises:
        UserError: The cell holds anything else.
    """
    if isinstance(value, str):
        try:
            value = parse_json(_MISSING.sub("null", value.translate(_BRACKETS)))
        except ValueError:
            raise UserError(
                f"{location}: column {column!r} holds no list of coordinates; write it as JSON, such as "
                "[[1.5, 0, -2], null]"
            ) from None
    if not isinstance(value, list):
        raise UserError(
            f"{location}: the coordinates in column {column!r} are {shortened(value)}, not a list of "
            "[x, y, z]; give one for each residue, null where it is not known"
        )
    rows = np.full((len(value), 3), math.nan)
    for number, row in enumerate(value):
        if row is None:
            continue
        if not isinstance(row, list) or len(row) != 3 or not all(_is_coordinate(x) for x in row):
            raise UserError(
                f"{location}: residue {number} in column {column!r} has {shortened(row)}; give [x, y, z] in "
                f"Angstrom, none beyond {_FARTHEST:g}, or null"
            )
        if None not in row:
            rows[number] = row
    rows[np.isnan(rows).any(axis=1)] = math.nan
    return rows


def _is_coordinate(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # A whole number may be too large for a float, so NaN is found by what it is not equal to.
    return value != value or abs(value) <= _FARTHEST


def pair_labels(coordinates: Array, ignored: int) -> npt.NDArray[np.int8]:
    """Return 1 for contacts, 0 for other pairs, and `ignored` for pairs that do not count, ``[p]``.

    Args:
        coordinates: Coordinates ``[l, 3]`` in Angstrom, NaN where unknown.
        ignored: Label of pairs that do not count, neither 0 nor 1.
    """
    first, second = pairs_of(len(coordinates))
    squared = ((coordinates[first] - coordinates[second]) ** 2).sum(axis=1)
    labels = (squared < DISTANCE**2).astype(np.int8)
    labels[np.isnan(squared) | (second - first < SEPARATION)] = ignored
    return labels
