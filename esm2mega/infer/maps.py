"""Hands out contact maps by rows, so that the map of a long protein is never in memory as a whole.

Legend: ``L`` residues of a protein, ``l`` of a window of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from esm2mega.infer.windows import Window
from esm2mega.model.contact_tiles import TILE


class BlockedMap(Protocol):
    """Is a map ``[L, L]`` of which some rows can be had at a time, as `ContactTiles` is."""

    shape: tuple[int, int]

    def rows(self, first: int, stop: int) -> Tensor:
        """Return rows from `first` to `stop`, exclusive: ``[stop - first, L]``."""


ContactMap = Tensor | BlockedMap


class JoinedMap:
    """Averages the maps of overlapping windows over those that hold both residues; other pairs are NaN."""

    def __init__(self, pieces: Sequence[tuple[Window, ContactMap]]) -> None:
        """Take the windows of a protein, in their order, and the map of each, ``[l, l]``."""
        length = pieces[0][0].num_residues
        self.shape = (length, length)
        self._pieces = pieces

    def rows(self, first: int, stop: int) -> Tensor:
        """Return rows from `first` to `stop`, exclusive: ``[stop - first, L]``, in fp32 or fp64."""
        example = some_rows(self._pieces[0][1], 0, 1)
        dtype = torch.promote_types(example.dtype, torch.float32)
        total = torch.zeros(stop - first, self.shape[1], dtype=dtype, device=example.device)
        count = torch.zeros_like(total)
        for window, values in self._pieces:
            held = window.residues
            low, high = max(first, held.start), min(stop, held.stop)
            if low < high:
                here = slice(low - first, high - first), held
                total[here] += some_rows(values, low - held.start, high - held.start)
                count[here] += 1
        return total / count


def some_rows(values: ContactMap, first: int, stop: int) -> Tensor:
    """Return rows of a map from `first` to `stop`, exclusive."""
    return values[first:stop] if isinstance(values, Tensor) else values.rows(first, stop)


def row_blocks(values: ContactMap) -> Iterator[tuple[int, Tensor]]:
    """Yield a map in blocks: the number of the first row, and ``[rows, L]``; a tensor is one block."""
    length = values.shape[0]
    size = length if isinstance(values, Tensor) else TILE
    for first in range(0, length, size):
        yield first, some_rows(values, first, min(first + size, length))


def in_memory(values: ContactMap) -> Tensor:
    """Return all of a map, which then is in memory."""
    return some_rows(values, 0, values.shape[0])


def cells(values: ContactMap, most: int) -> Tensor:
    """Return a map of at most `most` cells in each direction, each with the largest value of its residues.

    A cell without a value that is not NaN is NaN. A map that is not larger stays as it is.
    """
    length = values.shape[0]
    width = -(-length // most)
    if width == 1:
        return in_memory(values)
    size, beyond = width * max(1, TILE // width), -length % width
    found = []
    for first in range(0, length, size):
        rows = some_rows(values, first, min(first + size, length))
        rows = torch.where(rows.isnan(), -torch.inf, rows)
        padding = (0, beyond, 0, -len(rows) % width)
        blocks = torch.nn.functional.pad(rows, padding, value=-torch.inf).unflatten(1, (-1, width))
        found.append(blocks.unflatten(0, (-1, width)).amax(dim=(1, 3)))
    joined = torch.cat(found)
    return torch.where(joined.isinf(), torch.nan, joined)
