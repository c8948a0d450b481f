"""Draws contact maps, and heat maps of single substitutions, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TICKS = 12


def contact_map(path: Path, title: str, contacts: npt.NDArray[Any]) -> None:
    """Draw contact probabilities.

    Args:
        path: PNG to write.
        title: Title above the map.
        contacts: Probabilities, ``[L, L]``, 0 to 1; NaN stays blank.
    """
    figure, axes = _figure(6, 5.4)
    image = axes.imshow(contacts, cmap="Greys", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    figure.colorbar(image, label="contact probability")
    axes.set(title=title, xlabel="residue", ylabel="residue")
    _number(axes.xaxis, contacts.shape[0], 1)
    _number(axes.yaxis, contacts.shape[0], 1)
    figure.savefig(path, dpi=150)


def heat_map(
    path: Path, title: str, scores: npt.NDArray[Any], sequence: str, letters: Sequence[str], offset: int
) -> None:
    """Draw the scores of all single substitutions.

    Args:
        path: PNG to write.
        title: Title above the map.
        scores: Score of each substitution, ``[L, a]``; the wild type is marked with a dot.
        sequence: Wild type, L letters.
        letters: The a substituents.
        offset: Number of the first residue.
    """
    length = len(sequence)
    figure, axes = _figure(min(4 + length / 14, 120), 4.6)
    largest = float(np.nanmax(np.abs(scores))) or 1.0
    image = axes.imshow(
        scores.T, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, label="log p(mutant) - log p(wild type)", pad=0.01)
    own = [(i, letters.index(letter)) for i, letter in enumerate(sequence) if letter in letters]
    axes.scatter([i for i, _ in own], [j for _, j in own], s=3, c="black", linewidths=0)
    axes.set(title=title, xlabel="residue", ylabel="substituted by")
    axes.set_yticks(range(len(letters)), letters, fontsize=7)
    _number(axes.xaxis, length, offset)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Any:
    # A Figure of its own, not pyplot: it needs no window system and leaves no state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _number(axis: Any, length: int, offset: int) -> None:
    step = max(1, round(length / _TICKS, -1 if length > 10 * _TICKS else 0))
    ticks = np.arange(0, length, int(step))
    axis.set_ticks(ticks, [str(tick + offset) for tick in ticks])
