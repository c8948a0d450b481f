"""Numbers the pairs of residues of a protein, in the one order in which all modules keep them.

A protein of ``l`` residues has ``p = l (l - 1) / 2`` pairs i < j, in the order (0, 1), (0, 2), …, (1, 2), ….
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def num_pairs(length: int) -> int:
    """Pairs of a protein."""
    return length * (length - 1) // 2


def num_residues(pairs: int) -> int:
    """The inverse of `num_pairs`; no pairs are those of one residue."""
    return (1 + math.isqrt(1 + 8 * pairs)) // 2


def pairs_of(length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """i and j of all pairs, ``[p]`` each."""
    first, second = np.triu_indices(length, 1)
    return first, second
