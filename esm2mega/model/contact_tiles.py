"""Sums up the contact map of a long protein in tiles, which lie in a file: no map of it is whole in memory.

A protein of 34,350 residues has attention maps of 4.7 GB in fp32, one for each head. Here each layer passes
over the maps twice, and holds a bounded part of them at any time. The first pass finds, for each head, the
logarithm of every query's sum of exponentials, and the sums of rows and columns, which the average product
correction (APC) needs. The second one computes tile after tile of the upper triangle, for all heads together,
and adds their weighted sum to what earlier layers have added.

Legend: ``n`` heads, ``t`` tensor-parallel size, ``d`` head dimension, ``l`` residues of a protein, ``s`` its
tokens, ``b`` residues of a tile, fewer in the last ones.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.errors import MachineError

TILE = 512
"""Is the number of rows and columns of a tile, b: tiles of the 40 heads of a 15B model take 42 MB in fp32."""

PANEL_ELEMENTS = 1 << 24
"""Limits the elements of a map that the first pass holds at once: some rows of one head, 64 MB in fp32."""


class ContactTiles:
    """Holds a symmetric map ``[l, l]`` as the tiles of its upper triangle, in a file without a name.

    The file is gone when nothing refers to this object any more, or when the process ends in any way.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device, folder: Path | None) -> None:
        """Start with zeros, which take no room on the disk yet.

        Args:
            length: Residues, l.
            dtype: Of the values.
            device: Where tiles are handed out.
            folder: Where the file lies; None for the system's folder of temporary files.

        Raises:
            MachineError: The file cannot be made.
        """
        self.shape = (length, length)
        self.is_finite = True
        self._dtype, self._device = dtype, device
        self._tile_bytes = TILE * TILE * dtype.itemsize
        self._folder = tempfile.gettempdir() if folder is None else folder
        count = -(-length // TILE)
        self._numbers = {
            pair: n for n, pair in enumerate((i, j) for i in range(count) for j in range(i, count))
        }
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 lives as this does
            self._file.truncate(len(self._numbers) * self._tile_bytes)
        except OSError as error:
            raise self._failed(error) from error

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and the columns of each tile."""
        for i, j in self._numbers:
            yield self._residues(i), self._residues(j)

    def read(self, rows: slice, columns: slice) -> Tensor:
        """Return a tile: its rows and columns are those of `__iter__`."""
        tile = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=self._dtype)
        view = tile.view(torch.uint8).numpy().data.cast("B")
        position = self._position(rows, columns)
        while view:
            count = os.preadv(self._file.fileno(), [view], position)
            if not count:
                raise MachineError(f"{self._folder}: a temporary file there was cut short by another program")
            view, position = view[count:], position + count
        return tile.to(self._device)

    def write(self, rows: slice, columns: slice, tile: Tensor) -> None:
        """Replace a tile.

        Raises:
            MachineError: The disk is full.
        """
        view = tile.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        position = self._position(rows, columns)
        try:
            while view:
                count = os.pwrite(self._file.fileno(), view, position)
                view, position = view[count:], position + count
        except OSError as error:
            raise self._failed(error) from error

    def transform(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tile by what a function of it returns, and note whether all values are finite."""
        for rows, columns in self:
            tile = function(self.read(rows, columns))
            self.is_finite &= bool(tile.isfinite().all())
            self.write(rows, columns, tile)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return some rows of the whole map, ``[stop - first, l]``."""
        result = torch.empty(stop - first, self.shape[1], dtype=self._dtype, device=self._device)
        for i in range(first // TILE, -(-stop // TILE)):
            inside = self._residues(i)
            low, high = max(first, inside.start), min(stop, inside.stop)
            for j in range(-(-self.shape[1] // TILE)):
                columns = self._residues(j)
                tile = self.read(inside, columns) if i <= j else self.read(columns, inside).T
                result[low - first : high - first, columns] = tile[low - inside.start : high - inside.start]
        return result

    def _residues(self, number: int) -> slice:
        return slice(number * TILE, min((number + 1) * TILE, self.shape[0]))

    def _position(self, rows: slice, columns: slice) -> int:
        return self._numbers[rows.start // TILE, columns.start // TILE] * self._tile_bytes

    def _failed(self, error: OSError) -> MachineError:
        gigabytes = len(self._numbers) * self._tile_bytes / 1e9
        return MachineError(
            f"{self._folder}: the contacts of a protein of {self.shape[0]:,} residues need {gigabytes:,.1f} "
            f"GB there while they are computed: {error.strerror or error}; make room, or leave contacts out"
        )


def add_layer(tiles: ContactTiles, q: Tensor, k: Tensor, weight: Tensor, residues: slice) -> None:
    """Add the weighted, symmetrised and corrected attention maps of a layer.

    Args:
        tiles: The sum so far.
        q: Queries after the rotation, ``[n/t, s, d]``.
        k: Keys, likewise.
        weight: Weight of each head, ``[n/t]``.
        residues: Which of the ``s`` tokens are residues.
    """
    q = (q[:, residues] * q.shape[-1] ** -0.5).contiguous()
    k = k.contiguous()
    log_sums, rows = _row_sums(q, k, residues)
    k = k[:, residues]
    # [n/t, l]: the correction of residues i and j is the sum over heads of rows_i rows_j / total.
    shares = rows * (weight.to(rows.dtype) / rows.sum(dim=1))[:, None]
    rows, shares = rows.to(q.dtype), shares.to(q.dtype)
    # The heads at once depend on their number alone, so that no other protein changes the order of the sum.
    group = max(1, PANEL_ELEMENTS // (TILE * TILE))
    for here, there in tiles:
        tile = tiles.read(here, there)
        for first in range(0, len(q), group):
            heads = slice(first, first + group)
            # [n, b, b]: what residues here pay to those there, and the other way round
            forth, back = -log_sums[heads, here, None], -log_sums[heads, None, there]
            maps = torch.baddbmm(forth, q[heads, here], k[heads, there].mT).exp_()
            maps += torch.baddbmm(back, k[heads, here], q[heads, there].mT).exp_()
            tile += torch.einsum("n,nij->ij", weight[heads], maps)
        tile -= shares[:, here].T @ rows[:, there]
        if here == there:
            tile = tile.triu() + tile.triu(1).T  # products of matrices do not round alike on both sides
        tiles.write(here, there, tile)


def _row_sums(q: Tensor, k: Tensor, residues: slice) -> tuple[Tensor, Tensor]:
    """Return the logarithm of each query's sum of exponentials, and the row sums of the symmetrised maps.

    Args:
        q: Scaled queries of the residues, ``[n/t, l, d]``.
        k: Keys of all tokens, ``[n/t, s, d]``.
        residues: Which of the tokens are residues.

    Returns:
        Two tensors ``[n/t, l]``, the second one in fp64.
    """
    heads, length, _ = q.shape
    log_sums = q.new_empty(heads, length)
    sums = q.new_zeros(heads, length, dtype=torch.float64)
    size = max(1, PANEL_ELEMENTS // k.shape[1])
    for head in range(heads):
        for first in range(0, length, size):
            rows = slice(first, first + size)
            # One pass of exponentials, in place; the division is left to the sums.
            scores = q[head, rows] @ k[head].T
            largest = scores.amax(dim=1)
            totals = scores.sub_(largest[:, None]).exp_().sum(dim=1)
            log_sums[head, rows] = largest + totals.log()
            sums[head, rows] += scores[:, residues].sum(dim=1) / totals
            sums[head] += totals.reciprocal() @ scores[:, residues]
    return log_sums, sums
