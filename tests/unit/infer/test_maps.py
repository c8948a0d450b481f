"""Maps that are handed out by rows are the maps that are computed whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.infer import maps
from esm2mega.infer.maps import JoinedMap, cells, in_memory, row_blocks
from esm2mega.infer.windows import overlapping
from esm2mega.model import contact_tiles
from esm2mega.model.contact_tiles import ContactTiles


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_tiles, "TILE", 16)
    monkeypatch.setattr(maps, "TILE", 16)


def symmetric(length: int, seed: int) -> torch.Tensor:
    values = torch.rand(length, length, generator=torch.Generator().manual_seed(seed))
    return values + values.T


def tiles_of(values: torch.Tensor, folder: Path) -> ContactTiles:
    tiles = ContactTiles(len(values), values.dtype, values.device, folder)
    for rows, columns in tiles:
        tiles.write(rows, columns, values[rows, columns])
    return tiles


def test_rows_of_tiles_are_those_of_the_map(tmp_path: Path) -> None:
    values = symmetric(53, 1)
    tiles = tiles_of(values, tmp_path)
    blocks = list(row_blocks(tiles))
    assert [first for first, _ in blocks] == [0, 16, 32, 48]
    assert torch.equal(torch.cat([rows for _, rows in blocks]), values)
    assert torch.equal(in_memory(tiles), values)
    ((first, same),) = row_blocks(values)
    assert first == 0 and torch.equal(same, values)


def test_windows_are_averaged_whichever_form_they_have(tmp_path: Path) -> None:
    windows = overlapping(100, 42, 20)
    values = [symmetric(w.residues.stop - w.residues.start, n) for n, w in enumerate(windows)]
    total, count = torch.zeros(100, 100), torch.zeros(100, 100)
    for window, part in zip(windows, values, strict=True):
        total[window.residues, window.residues] += part
        count[window.residues, window.residues] += 1
    joined = JoinedMap(list(zip(windows, values, strict=True)))
    assert torch.equal(in_memory(joined).nan_to_num(-1), (total / count).nan_to_num(-1))
    assert count.eq(0).any()
    in_tiles = JoinedMap([(w, tiles_of(part, tmp_path)) for w, part in zip(windows, values, strict=True)])
    for (first, rows), (other, same) in zip(row_blocks(joined), row_blocks(in_tiles), strict=True):
        assert first == other and torch.equal(rows.nan_to_num(-1), same.nan_to_num(-1))


def test_cells_hold_the_largest_value(tmp_path: Path) -> None:
    values = symmetric(53, 2)
    values[:9, :9] = torch.nan
    expected = np.full((18, 18), np.nan)
    for i in range(18):
        for j in range(18):
            cell = values[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].numpy()
            if not np.isnan(cell).all():
                expected[i, j] = np.nanmax(cell)
    for form in (values, tiles_of(values, tmp_path)):
        found = cells(form, 20)
        np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
    assert torch.equal(cells(values, 53).nan_to_num(-1), values.nan_to_num(-1))
