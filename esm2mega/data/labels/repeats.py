"""Counts proteins that a split holds several times, and those among them whose labels disagree.

Legend: ``n`` proteins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.labels.degenerate import SplitLabels


def repeat_notes(split: SplitLabels, tokens: npt.NDArray[np.uint8], per_residue: bool) -> list[str]:
    """Describe repeated sequences in one line; none without repeats.

    Args:
        split: Labels of the proteins.
        tokens: Residues of all proteins back to back.
        per_residue: Whether labels are stored by residue.
    """
    offsets = split.offsets.tolist()
    seen: dict[bytes, int] = {}
    repeats: list[tuple[int, int]] = []
    for row, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        first = seen.setdefault(tokens[begin:end].tobytes(), row)
        if first != row:
            repeats.append((row, first))
    if not repeats:
        return []

    def label(row: int) -> npt.NDArray[Any]:
        chosen = split.labels[offsets[row] : offsets[row + 1]] if per_residue else split.labels[row]
        return np.asarray(chosen)

    def place(pair: tuple[int, int]) -> str:
        row, first = pair
        return f"first {split.locations[row]} as {split.locations[first]}"

    is_float = split.labels.dtype.kind == "f"
    other = [
        (row, first)
        for row, first in repeats
        if not np.array_equal(label(row), label(first), equal_nan=is_float)
    ]
    note = (
        f"{len(repeats)} of {len(split.locations)} proteins of {split.key} repeat the sequence of an "
        f"earlier one, {place(repeats[0])}"
    )
    if not other:
        return [f"{note}; their labels agree"]
    return [f"{note}; {len(other)} of them have other labels, {place(other[0])}"]
