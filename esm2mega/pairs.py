"""Numbers the pairs of residues of a protein, in the one order that all modules use.

A protein of ``l`` residues has ``p = l (l - 1) / 2`` pairs i < j, in the order (0, 1), (0, 2), …, (1, 2), ….
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def num_pairs(length: int) -> int:
    """Return the number of pairs of a protein of `length` residues."""
    return length * (length - 1) // 2


def num_residues(pairs: int) -> int:
    """Return the number of residues of a protein with that many pairs; 1 for no pairs."""
    return (1 + math.isqrt(1 + 8 * pairs)) // 2


def pairs_of(length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return i and j of all pairs, ``[p]`` each."""
    first, second = np.triu_indices(length, 1)
    return first, second
