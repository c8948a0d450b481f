"""Turns proteins into sparse matrices that linear models are fitted to.

All residues but the 20 standard ones count as one more letter.

Legend: ``n`` proteins, ``R`` residues, ``h`` columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.vocabulary import STANDARD_RESIDUES, VOCAB

_NUM_LETTERS = len(STANDARD_RESIDUES) + 1
_LETTER = np.full(len(VOCAB), _NUM_LETTERS - 1)
_LETTER[STANDARD_RESIDUES] = np.arange(len(STANDARD_RESIDUES))

K_MERS = (1, 2, 3)
"""Lengths of the pieces of a protein that are counted."""

HALF_WINDOW = 5
"""Residues on each side that a window has around its own residue: 11 in all."""


class OneHot:
    """Has a column for each residue that the training proteins have at each position, where that varies.

    Positions at which they are all alike tell a linear model nothing. A residue that training did not have at
    a position has no column.
    """

    def __init__(self, train: LabelledProteins) -> None:
        """Learn the columns.

        Args:
            train: Proteins of one length.
        """
        from sklearn.preprocessing import OneHotEncoder

        letters = _aligned(train)
        self._positions = np.flatnonzero((letters != letters[:1]).any(axis=0))
        self._encoder = OneHotEncoder(handle_unknown="ignore", dtype=np.float32)
        if len(self._positions):
            self._encoder.fit(letters[:, self._positions])

    def __call__(self, proteins: LabelledProteins) -> Any:
        """Return 1 for each residue that a protein has, float32 ``[n, h]``."""
        from scipy.sparse import csr_matrix

        if not len(self._positions):
            return csr_matrix((len(proteins), 1), dtype=np.float32)
        return self._encoder.transform(_aligned(proteins)[:, self._positions])


def _aligned(proteins: LabelledProteins) -> npt.NDArray[np.int64]:
    return _LETTER[proteins.tokens].reshape(len(proteins), -1)


def k_mers(proteins: LabelledProteins) -> Any:
    """Return square roots of the frequencies of all pieces of 1, 2 and 3 residues, float32 ``[n, 9723]``.

    The squares of a protein's pieces of one length add up to 1, so that no protein and no length outweighs
    another.
    """
    from scipy.sparse import csr_matrix, hstack

    letters, owners = _LETTER[proteins.tokens], np.repeat(np.arange(len(proteins)), proteins.lengths)
    # Residues that follow in the same protein.
    following = np.repeat(proteins.offsets[1:], proteins.lengths) - np.arange(len(letters))
    blocks = []
    for k in K_MERS:
        starts = np.flatnonzero(following >= k)
        code, width = np.zeros(len(starts), np.int64), _NUM_LETTERS**k
        for step in range(k):
            code = code * _NUM_LETTERS + letters[starts + step]
        keys, counts = np.unique(owners[starts] * width + code, return_counts=True)
        rows, columns = np.divmod(keys, width)
        totals = np.maximum(proteins.lengths - k + 1, 1)
        values = np.sqrt(counts / totals[rows]).astype(np.float32)
        blocks.append(csr_matrix((values, (rows, columns)), shape=(len(proteins), width)))
    return hstack(blocks, format="csr")


def windows(proteins: LabelledProteins, chosen: npt.NDArray[np.int64]) -> Any:
    """Return 1 for the letter at each place around residues, or for none there, float32 ``[R, h]``.

    Args:
        proteins: The proteins.
        chosen: Numbers of the residues among those of all proteins, ``[R]``.
    """
    from scipy.sparse import csr_matrix

    places = chosen[:, None] + np.arange(-HALF_WINDOW, HALF_WINDOW + 1)
    owner = np.searchsorted(proteins.offsets, chosen, side="right") - 1
    inside = (places >= proteins.offsets[owner, None]) & (places < proteins.offsets[owner + 1, None])
    letters = _LETTER[proteins.tokens[np.clip(places, 0, len(proteins.tokens) - 1)]]
    letters = np.where(inside, letters, _NUM_LETTERS)
    width, size = _NUM_LETTERS + 1, places.shape[1]
    columns = (np.arange(size) * width + letters).ravel()
    borders = np.arange(0, len(columns) + 1, size)
    return csr_matrix(
        (np.ones(len(columns), np.float32), columns, borders), shape=(len(chosen), size * width)
    )
