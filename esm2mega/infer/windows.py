"""Cuts proteins into the pieces that the model sees at once: whole, cropped, or overlapping windows.

A protein of L residues has L + 2 tokens, ``<cls>`` residues ``<eos>``. A window is a stretch of these
tokens, so one from the inside has neither, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esm2mega.vocabulary import CLS, EOS


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` (exclusive) of a protein of `num_residues` residues."""

    start: int
    stop: int
    num_residues: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def residues(self) -> slice:
        """Which residues of the protein it holds. Residue i is token i + 1."""
        return slice(max(self.start - 1, 0), min(self.stop - 1, self.num_residues))

    @property
    def residue_tokens(self) -> slice:
        """Where in the window they are: everything but ``<cls>`` and ``<eos>``."""
        first = int(self.start == 0)
        return slice(first, first + self.residues.stop - self.residues.start)

    def tokens(self, residues: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The window's token ids.

        Args:
            residues: token ids of all residues of the protein, without special tokens, [L].
        """
        parts = [residues[self.residues]]
        if self.start == 0:
            parts.insert(0, np.array([CLS], dtype=np.uint8))
        if self.stop == self.num_residues + 2:
            parts.append(np.array([EOS], dtype=np.uint8))
        return np.concatenate(parts)


def whole(num_residues: int) -> Window:
    """All tokens of a protein."""
    return Window(0, num_residues + 2, num_residues)


def overlapping(num_residues: int, width: int, overlap: int) -> list[Window]:
    """Windows over a protein, each moved by `width - overlap` tokens; the last one ends with the protein.

    Args:
        num_residues: L.
        width: tokens of a window; proteins that fit are one window.
        overlap: tokens that neighbouring windows share; more at the end.
    """
    total = num_residues + 2
    if total <= width:
        return [whole(num_residues)]
    starts = [*range(0, total - width, width - overlap), total - width]
    return [Window(start, start + width, num_residues) for start in starts]


def optimal(residue: int, num_residues: int, width: int) -> Window:
    """The window of `width` tokens with a residue as near to its middle as the ends allow (ProteinGym)."""
    total = num_residues + 2
    if total <= width:
        return whole(num_residues)
    start = min(max(residue + 1 - width // 2, 0), total - width)
    return Window(start, start + width, num_residues)
