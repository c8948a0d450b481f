"""Draws contact maps, and heat maps of single substitutions, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.files import replacing

RESIDUES_OF_A_ROW = 100
"""Is where a heat map goes on in a row below."""

READING = (
    "How to read it: a band along the diagonal, four residues off, is a helix;\n"
    "a ladder parallel to the diagonal is a pair of parallel strands, one across it\n"
    "a pair of antiparallel ones; single dots far from it hold the fold together."
)

MOST_CELLS = 2048
"""Limits the cells of a contact map: the picture has fewer dots."""

_TICKS = 12
_SHARP_ROWS = 40
"""Counts the rows up to which a heat map has 150 dots per inch: beyond, the picture would grow too large."""


def contact_map(path: Path, title: str, contacts: npt.NDArray[Any], length: int) -> None:
    """Draw contact probabilities.

    Args:
        path: PNG to write.
        title: Title above the map.
        contacts: Probabilities, ``[c, c]``, 0 to 1: of pairs of residues, or the largest ones of cells, whose
            width is ``L / c`` residues, rounded up; NaN stays blank.
        length: Residues of the protein, L.
    """
    _save(contact_map_figure(title, contacts, length), path, 150)


def contact_map_figure(title: str, contacts: npt.NDArray[Any], length: int) -> Any:
    """Return the figure of `contact_map`, whose arguments these are."""
    figure, (axes,) = _figure(6, 6.2)
    end = len(contacts) * -(-length // len(contacts)) - 0.5
    image = axes.imshow(
        contacts,
        cmap="Greys",
        vmin=0,
        vmax=1,
        origin="lower",
        interpolation="nearest",
        extent=(-0.5, end, -0.5, end),
    )
    figure.colorbar(image, label="contact probability")
    axes.set(title=title, xlabel=f"residue\n\n{READING}", ylabel="residue")
    _number(axes.xaxis, length, 1)
    _number(axes.yaxis, length, 1)
    return figure


def heat_map(
    path: Path, title: str, scores: npt.NDArray[Any], sequence: str, letters: Sequence[str], offset: int
) -> None:
    """Draw the scores of all single substitutions, with 100 residues in a row.

    Args:
        path: PNG to write.
        title: Title above the map.
        scores: Score of each substitution, ``[L, a]``; the wild type is marked with a dot.
        sequence: Wild type, L letters.
        letters: The a substituents.
        offset: Number of the first residue.
    """
    figure = heat_map_figure(title, scores, sequence, letters, offset)
    _save(figure, path, 150 if len(sequence) <= _SHARP_ROWS * RESIDUES_OF_A_ROW else 75)


def _save(figure: Any, path: Path, dpi: int) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:] or "png", dpi=dpi)


def heat_map_figure(
    title: str, scores: npt.NDArray[Any], sequence: str, letters: Sequence[str], offset: int
) -> Any:
    """Return the figure of `heat_map`, whose arguments these are."""
    length = len(sequence)
    rows = -(-length // RESIDUES_OF_A_ROW)
    width = min(length, RESIDUES_OF_A_ROW)
    figure, panels = _figure(3 + width / 9, 0.8 + 3.2 * rows, rows)
    largest = float(np.nanmax(np.abs(scores))) or 1.0
    for row, axes in enumerate(panels):
        first = row * RESIDUES_OF_A_ROW
        part = scores[first : first + RESIDUES_OF_A_ROW]
        image = axes.imshow(
            part.T, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
        )
        own = [
            (i, letters.index(letter))
            for i, letter in enumerate(sequence[first : first + RESIDUES_OF_A_ROW])
            if letter in letters
        ]
        axes.scatter([i for i, _ in own], [j for _, j in own], s=3, c="black", linewidths=0)
        axes.set_yticks(range(len(letters)), letters, fontsize=7)
        axes.set_ylabel("substituted by")
        # Every row is as wide as a whole one, so that a residue has the same size in all.
        axes.set_xlim(-0.5, width - 0.5)
        ticks = [i for i in range(len(part)) if i == 0 or (i + first + offset) % 10 == 0]
        axes.set_xticks(ticks, [str(i + first + offset) for i in ticks], fontsize=7)
    panels[0].set_title(title)
    panels[-1].set_xlabel("residue; a dot marks the wild type")
    figure.colorbar(
        image, ax=list(panels), label="log p(mutant) - log p(wild type)", pad=0.01, aspect=20 * rows
    )
    return figure


def _figure(width: float, height: float, rows: int = 1) -> Any:
    # A Figure of its own, not pyplot: it needs no window system and leaves no state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, squeeze=False)[:, 0]


def _number(axis: Any, length: int, offset: int) -> None:
    step = max(1, round(length / _TICKS, -1 if length > 10 * _TICKS else 0))
    ticks = np.arange(0, length, int(step))
    axis.set_ticks(ticks, [str(tick + offset) for tick in ticks])
