"""Projects the embeddings of a test split onto two dimensions, so that a reader can see what lies together.

Legend: ``n`` points, ``h`` hidden size.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from esm2mega.autoeval.prediction_table import ID
from esm2mega.autoeval.probe.embeddings import Array, Embeddings
from esm2mega.config.task import RESIDUE_KINDS
from esm2mega.errors import MachineError
from esm2mega.files import replacing, shortened

MOST_POINTS = 2000
"""Bounds the points of a plane; of more proteins some are chosen, evenly along the table."""

_RESIDUES_OF_A_PROTEIN = 10
_FEWEST = 3
_SET = ("1", "1.0", "true", "True")
_NEIGHBOURS = 15


def write_plane(
    path: Path, embeddings: Path, layer: str, labels: Sequence[tuple[str, str]], per_residue: bool, seed: int
) -> bool:
    """Write a row for each point: id, label, its principal components, and its UMAP where that is installed.

    Args:
        path: The CSV.
        embeddings: HDF5 file with the embeddings of the proteins.
        layer: The layer that is shown.
        labels: Id and label of each protein; of residues one character for each, ``-`` where there is none.
        per_residue: Whether the points are residues.
        seed: Seed of UMAP.

    Returns:
        Whether there are enough points; else nothing is written.
    """
    with Embeddings([embeddings]) as found:
        points = _residues(found, layer, labels) if per_residue else _proteins(found, layer, labels)
    names, shown, vectors = points
    if len(names) < _FEWEST:
        return False
    planes = {"pca": pca(vectors), **umap_plane(vectors, seed)}
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "label", *(f"{method}_{n}" for method in planes for n in (1, 2))])
        for row, (name, label) in enumerate(zip(names, shown, strict=True)):
            writer.writerow([name, label, *(f"{x:.5g}" for plane in planes.values() for x in plane[row])])
    return True


def plane_labels(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str], kind: str
) -> list[tuple[str, str]] | None:
    """Return id and label of each protein for `write_plane`: of the first column, or all flags that are set.

    Args:
        rows: Rows of the table of the test split.
        columns: Columns of the labels.
        kind: The value of `task.kind`.

    Returns:
        The labels; None where residues have no classes of one character each.
    """
    if kind == "multilabel" and len(columns) > 1:
        flags = ({name for name in columns if row[name].strip() in _SET} for row in rows)
        return [(row[ID], ";".join(sorted(names)) or "none") for row, names in zip(rows, flags, strict=True)]
    labels = [(row[ID], row[columns[0]]) for row in rows]
    if kind in RESIDUE_KINDS and any(len(row["sequence"]) != len(row[columns[0]]) for row in rows):
        return None
    return labels


def pca(vectors: Array) -> Array:
    """Return the first two principal components, ``[n, 2]``; zeros for one that there is not.

    Args:
        vectors: The points, ``[n, h]``.
    """
    from sklearn.decomposition import PCA

    count = min(2, *vectors.shape)
    plane = np.zeros((len(vectors), 2))
    # Points that are all the same have no variance to divide by, and lie at 0.
    with np.errstate(invalid="ignore"):
        plane[:, :count] = PCA(count, svd_solver="full").fit_transform(vectors.astype(np.float64))
    return plane


def umap_plane(vectors: Array, seed: int) -> dict[str, Array]:
    """Return the plane of UMAP under its name; nothing where it is not installed, or has too few points."""
    if importlib.util.find_spec("umap") is None or len(vectors) <= 2 * _NEIGHBOURS:
        return {}
    try:
        umap = importlib.import_module("umap")
    except ImportError as error:
        raise MachineError(
            f"umap-learn is installed and cannot be imported: {shortened(str(error))}; install it again with "
            "what it needs, or uninstall it for results without UMAP"
        ) from None
    # With a seed UMAP runs in one thread, and gives the same plane again.
    draw = seed % (1 << 32)  # a seed of UMAP has 32 bits
    return {"umap": umap.UMAP(n_neighbors=_NEIGHBOURS, random_state=draw, n_jobs=1).fit_transform(vectors)}


Points = tuple[list[str], list[str], Array]
"""Holds the names, labels and vectors of the points, ``[n]``, ``[n]`` and ``[n, h]``."""


def _proteins(found: Embeddings, layer: str, labels: Sequence[tuple[str, str]]) -> Points:
    chosen = evenly([pair for pair in labels if pair[1].strip()], MOST_POINTS)
    names, shown = [name for name, _ in chosen], [label for _, label in chosen]
    return names, shown, found.vectors(layer, names) if names else np.zeros((0, 1))


def _residues(found: Embeddings, layer: str, labels: Sequence[tuple[str, str]]) -> Points:
    names: list[str] = []
    shown: list[str] = []
    parts: list[Array] = []
    for name, letters in evenly(labels, MOST_POINTS // _RESIDUES_OF_A_PROTEIN):
        numbers = [number for number, letter in enumerate(letters) if letter != "-"]
        chosen = evenly(numbers, _RESIDUES_OF_A_PROTEIN)
        if chosen:
            parts.append(found.residues(layer, name)[chosen])
            names += [f"{name}:{number + 1}" for number in chosen]
            shown += [letters[number] for number in chosen]
    return names, shown, np.concatenate(parts) if parts else np.zeros((0, 1))


def evenly(values: Sequence, most: int) -> list:
    """Return at most `most` values, evenly chosen along their order."""
    if len(values) <= most:
        return list(values)
    return [values[number] for number in np.linspace(0, len(values) - 1, most).round().astype(int).tolist()]
