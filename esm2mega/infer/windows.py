"""Cuts proteins into the pieces that the model sees at once: whole, cropped, or overlapping windows.

A protein of L residues has L + 2 tokens: ``<cls>``, its residues, and ``<eos>``. A window is a stretch of
these tokens, so one from the inside has neither ``<cls>`` nor ``<eos>``, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esm2mega.vocabulary import CLS, EOS


@dataclass(frozen=True)
class Window:
    """Holds the borders of a window: tokens `start` to `stop` (exclusive) of a protein of `num_residues`."""

    start: int
    stop: int
    num_residues: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def residues(self) -> slice:
        """Return which residues of the protein the window holds; residue i is token i + 1."""
        return slice(max(self.start - 1, 0), min(self.stop - 1, self.num_residues))

    @property
    def residue_tokens(self) -> slice:
        """Return where in the window the residues are: everything but ``<cls>`` and ``<eos>``."""
        first = int(self.start == 0)
        return slice(first, first + self.residues.stop - self.residues.start)

    def tokens(self, residues: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the token ids of the window, uint8.

        Args:
            residues: Token ids of all residues of the protein, without special tokens, uint8 ``[L]``.
        """
        parts = [residues[self.residues]]
        if self.start == 0:
            parts.insert(0, np.array([CLS], dtype=np.uint8))
        if self.stop == self.num_residues + 2:
            parts.append(np.array([EOS], dtype=np.uint8))
        return np.concatenate(parts)


def whole(num_residues: int) -> Window:
    """Return the window of all tokens of a protein."""
    return Window(0, num_residues + 2, num_residues)


def overlapping(num_residues: int, width: int, overlap: int) -> list[Window]:
    """Return windows over a protein, each `width - overlap` tokens further; the last ends with the protein.

    Args:
        num_residues: Number L of residues of the protein.
        width: Number of tokens of a window; a protein that fits is one window.
        overlap: Number of tokens that neighbouring windows share; the last two may share more.
    """
    total = num_residues + 2
    if total <= width:
        return [whole(num_residues)]
    starts = [*range(0, total - width, width - overlap), total - width]
    return [Window(start, start + width, num_residues) for start in starts]


def optimal(residue: int, num_residues: int, width: int) -> Window:
    """Return the window of `width` tokens with a residue as near to its middle as the ends allow.

    ProteinGym chooses its windows like this.
    """
    total = num_residues + 2
    if total <= width:
        return whole(num_residues)
    start = min(max(residue + 1 - width // 2, 0), total - width)
    return Window(start, start + width, num_residues)
