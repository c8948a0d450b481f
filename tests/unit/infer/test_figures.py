"""Pictures show the numbers they are given, at the right residues, with nothing cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from esm2mega.infer.figures import READING, contact_map, contact_map_figure, heat_map_figure


def test_a_long_protein_has_rows_of_100_residues_with_their_numbers() -> None:
    sequence = "MKTAYIAKQR" * 23 + "MKTA"
    scores = np.arange(234.0 * 20).reshape(234, 20) - 2000
    *rows, bar = heat_map_figure("t", scores, sequence, "ACDEFGHIKLMNPQRSTVWY", 25).axes
    assert len(rows) == 3 and bar.get_ylabel().startswith("log p(mutant)")
    for row, first in zip(rows, (0, 100, 200), strict=True):
        drawn = row.images[0].get_array()
        assert np.array_equal(drawn, scores[first : first + 100].T)
        assert row.get_xlim() == (-0.5, 99.5)
        labels = [tick.get_text() for tick in row.get_xticklabels()]
        assert labels[:3] == [str(first + 25), str(first + 30), str(first + 40)]
        assert len(row.collections[0].get_offsets()) == min(100, 234 - first), "a dot for each wild type"


@pytest.mark.parametrize(("length", "cells"), [(37, 37), (700, 350)])
def test_a_contact_map_has_its_numbers_and_how_to_read_them(length: int, cells: int) -> None:
    contacts = np.linspace(0, 1, cells * cells).reshape(cells, cells)
    contacts[0, 1] = np.nan
    figure = contact_map_figure("a protein", contacts, length)
    axes, bar = figure.axes
    (image,) = axes.images
    assert np.array_equal(image.get_array().filled(np.nan), contacts, equal_nan=True)
    assert image.get_extent() == [-0.5, length - 0.5, -0.5, length - 0.5] and image.get_clim() == (0, 1)
    assert image.origin == "lower" and bar.get_ylabel() == "contact probability"
    for axis in (axes.xaxis, axes.yaxis):
        assert [int(tick.get_text()) for tick in axis.get_ticklabels()] == [
            n + 1 for n in axis.get_ticklocs()
        ]
    assert axes.get_xlabel().endswith(READING)
    figure.canvas.draw()
    legend = axes.xaxis.label.get_window_extent()
    assert legend.x0 >= 0 and legend.y0 >= 0 and legend.x1 <= figure.bbox.x1, "the legend is cut off"


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    contact_map(tmp_path / "x.png", "a protein", np.zeros((9, 9)), 9)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
