"""The contacts of a long protein in tiles equal those computed whole, and memory is bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm2mega.errors import MachineError
from esm2mega.model import contact_tiles
from esm2mega.model.contact_maps import ContactMaps, Span, _weighted_maps, is_long
from esm2mega.model.contact_tiles import ContactTiles, add_layer

CPU = torch.device("cpu")
HEADS, CHANNELS, LAYERS = 4, 32, 3


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and panels that a protein of 700 residues has many of, and groups of 3 of the 4 heads."""
    monkeypatch.setattr(contact_tiles, "TILE", 96)
    monkeypatch.setattr(contact_tiles, "PANEL_ELEMENTS", 3 * 96 * 96)


def drawn(tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys whose softmax is far from uniform, ``[n, s, d]``, and a weight for each head."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(HEADS, tokens, CHANNELS, generator=generator, dtype=dtype) * 1.5 for _ in range(2))
    return q, k, torch.randn(HEADS, generator=generator, dtype=dtype)


def plain(q: Tensor, k: Tensor, weight: Tensor, residues: slice) -> Tensor:
    """What the formula says, head by head, with whole maps."""
    total = torch.zeros(residues.stop - residues.start, residues.stop - residues.start, dtype=q.dtype)
    for head in range(len(q)):
        attention = torch.softmax(q[head] @ k[head].T / CHANNELS**0.5, dim=-1)[residues, residues]
        symmetric = attention + attention.T
        rows = symmetric.sum(0)
        total += weight[head] * (symmetric - torch.outer(rows, rows) / rows.sum())
    return total


def tiled(length: int, residues: slice, folder: Path, dtype: torch.dtype = torch.float64) -> ContactTiles:
    tiles = ContactTiles(residues.stop - residues.start, dtype, CPU, folder)
    for layer in range(LAYERS):
        add_layer(tiles, *drawn(length, layer, dtype), residues)
    return tiles


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("residues", [slice(1, 703), slice(0, 704)], ids=["with ends", "a window"])
def test_tiles_equal_whole_maps(residues: slice, tmp_path: Path) -> None:
    """In fp64: sums of some hundred numbers around 1."""
    tiles = tiled(704, residues, tmp_path)
    length = residues.stop - residues.start
    expected = sum(plain(*drawn(704, layer), residues) for layer in range(LAYERS))
    today = sum(_weighted_maps(*drawn(704, layer), residues) for layer in range(LAYERS))
    assert isinstance(expected, Tensor) and isinstance(today, Tensor)
    found = tiles.rows(0, length)
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-10
    assert (found - today).abs().max() < 1e-10
    assert torch.equal(found, found.T)
    # Any rows are those of the whole, also across tiles.
    for first, stop in ((0, 1), (95, 97), (100, 400), (length - 3, length)):
        assert torch.equal(tiles.rows(first, stop), found[first:stop])
    tiles.transform(torch.sigmoid)
    assert torch.equal(tiles.rows(0, length), torch.sigmoid(found)) and tiles.is_finite
    tiles.transform(lambda tile: tile.fill_(torch.nan))
    assert not tiles.is_finite


@pytest.mark.usefixtures("small")
def test_fp32_is_as_exact_as_whole_maps(tmp_path: Path) -> None:
    """Both are within the rounding of fp32 of the same in fp64, and neither is nearer by much."""
    residues = slice(1, 703)
    exact = sum(plain(*(x.double() for x in drawn(704, n, torch.float32)), residues) for n in range(LAYERS))
    today = sum(_weighted_maps(*drawn(704, n, torch.float32), residues) for n in range(LAYERS))
    found = tiled(704, residues, tmp_path, torch.float32).rows(0, 702)
    assert (today - exact).abs().max() < 2e-6 * exact.abs().max()
    assert (found - exact).abs().max() < 2e-6 * exact.abs().max()


@pytest.mark.usefixtures("small")
def test_memory_is_bounded_by_tiles_and_panels(tmp_path: Path) -> None:
    """Twice the length is four times the map; what is held grows by queries and keys alone."""

    def peak(length: int) -> int:
        held = [0]
        q, k, weight = drawn(length, 0, torch.float32)
        tiles = ContactTiles(length, torch.float32, CPU, tmp_path)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            add_layer(tiles, q, k, weight, slice(0, length))
        now = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                held[0] = max(held[0], now)
        return held[0]

    small, large = peak(960), peak(1920)
    inputs = 4 * 4 * HEADS * CHANNELS * 960  # q, k, and what is made of them, of the further residues
    assert large < small + 2 * inputs < 4 * 1920**2, (small, large)


def test_the_length_alone_chooses_the_path() -> None:
    assert not is_long(Span(7, 4097, slice(1, 4095)))
    assert is_long(Span(0, 4099, slice(1, 4098)))
    assert not ContactMaps([]).sums


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(28, "No space left on device")

    tiles = ContactTiles(10, torch.float32, CPU, tmp_path)
    assert not list(tmp_path.iterdir())  # it has no name, so nothing is left behind
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MachineError, match=r"10 residues need 0.0 GB .*No space left on device; make room"):
        tiles.write(slice(0, 10), slice(0, 10), torch.zeros(10, 10))
    with pytest.raises(MachineError, match="No such file"):
        ContactTiles(10, torch.float32, CPU, tmp_path / "missing")
