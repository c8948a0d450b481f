"""`map` draws the proteins of a file of embeddings in two dimensions: a page, or a bundle for ProtSpace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esm2mega.autoeval.plane import evenly, pca, umap_plane
from esm2mega.autoeval.probe.embeddings import POOLED, RESIDUE, Array, EmbeddingFile
from esm2mega.autoeval.protspace import write_bundle
from esm2mega.data.labels.numbers import PLAIN, read_number
from esm2mega.errors import UserError
from esm2mega.files import first_of, refuse_existing
from esm2mega.finetune.metrics import check_packages
from esm2mega.infer.variant_tables import Table, read_table
from esm2mega.report.results.groups import MISSING, as_numbers
from esm2mega.report.results.map_page import METHODS, write_map_page

PAGE, BUNDLE = ".html", ".parquetbundle"

_MOST_POINTS = 10_000
_FEWEST = 3
_ID, _SEQUENCE = "id", "sequence"


@dataclass(frozen=True)
class MapRequest:
    """Says what is drawn.

    Attributes:
        embeddings: HDF5 file with a vector for each protein, or with residues, which are averaged.
        out: Page or bundle to make.
        labels: Table of labels; None for none.
        column: Column of the table that colours the points; None for its only one.
        id_column: Column with the ids of the proteins.
        numbers: How its numbers are written, as `data.numbers` says.
        layer: Number of the layer; None for the last one of the file.
        seed: Seed of UMAP.
    """

    embeddings: Path
    out: Path
    labels: Path | None = None
    column: str | None = None
    id_column: str = _ID
    numbers: str = PLAIN
    layer: int | None = None
    seed: int = 0


def draw_map(request: MapRequest) -> list[str]:
    """Draw a map.

    Returns:
        Lines of a report for the user.

    Raises:
        UserError: A file cannot be read, proteins have no label, or the output exists.
    """
    out = request.out
    if out.suffix not in (PAGE, BUNDLE):
        raise UserError(f"--out {out}: name it NAME{PAGE} for a page, or NAME{BUNDLE} for ProtSpace")
    refuse_existing(out)
    check_packages()
    file = EmbeddingFile(request.embeddings)
    try:
        numbers = evenly(range(len(file.ids)), _MOST_POINTS)
        if len(numbers) < _FEWEST:
            raise UserError(f"{request.embeddings}: holds {len(numbers)} proteins; a map needs {_FEWEST}")
        ids = [file.ids[number] for number in numbers]
        labels = _labels(request, ids)
        layer, vectors = _vectors(file, request.layer, numbers)
    finally:
        file.close()
    planes = {"pca": pca(vectors), **umap_plane(vectors, request.seed)}
    notes = [f"{layer} of {request.embeddings.name}"]
    if len(ids) < len(file.ids):
        notes.append(f"{len(ids):,} of {len(file.ids):,} proteins, evenly chosen")
    if out.suffix == BUNDLE:
        write_bundle(out, planes, ids, labels.of)
    else:
        shown = None if labels.shown is None else labels.of[labels.shown]
        if labels.shown is not None:
            notes.append(f"coloured by {labels.shown} of {request.labels.name if request.labels else ''}")
        write_map_page(out, planes, ids, shown, f"Map of {request.embeddings.name}", notes)
    methods = " and ".join(METHODS[name] for name in planes)
    lines = [f"{len(ids):,} proteins of {request.embeddings}, {layer}: {methods} -> {out}"]
    if labels.missing:
        lines.append(f"{labels.missing:,} proteins have no row in {request.labels}; their label is {MISSING}")
    if out.suffix == PAGE and labels.shown is not None and (words := _words(labels.of[labels.shown])):
        lines.append(
            f"cells of {labels.shown} that are not numbers, such as {words[0]!r}: {len(words):,}, in grey"
        )
    if "umap" not in planes:
        lines.append("for UMAP too: pip install umap-learn")
    return lines


@dataclass(frozen=True)
class _Labels:
    """Holds the labels of the proteins.

    Attributes:
        of: Label of each protein by the column.
        shown: The column that colours the points; None for none.
        missing: How many proteins the table does not have.
    """

    of: Mapping[str, Sequence[str]]
    shown: str | None
    missing: int = 0


def _labels(request: MapRequest, ids: Sequence[str]) -> _Labels:
    if request.labels is None:
        if request.column is not None:
            raise UserError(f"--column {request.column} is a column of --labels; give that too")
        return _Labels({}, None)
    table = read_table(request.labels)
    names = [name.strip() for name in table.column(request.id_column, "--id-column")]
    rows = {name: number for number, name in enumerate(names)}
    if len(rows) < len(names):
        twice = next(name for number, name in enumerate(names) if rows[name] != number)
        raise UserError(f"{request.labels}: the id {twice!r} occurs more than once; keep one row for each id")
    found = [rows.get(name) for name in ids]
    if all(row is None for row in found):
        raise UserError(
            f"{request.labels}: none of its ids, first {names[0]!r}, is in {request.embeddings}, first "
            f"{ids[0]!r}; name the column of the ids with --id-column"
        )
    columns = [name for name in table.columns if name not in (request.id_column, _SEQUENCE)]
    shown = _shown_column(request, table, columns)
    # A page shows one column, a bundle has all of them, the one to begin with first.
    wanted = [shown] if request.out.suffix == PAGE else dict.fromkeys([shown, *columns])
    of = {name: _cells(table.column(name, "--column"), found, request.numbers) for name in wanted}
    return _Labels(of, shown, sum(row is None for row in found))


def _shown_column(request: MapRequest, table: Table, columns: Sequence[str]) -> str:
    if request.column is not None:
        table.column(request.column, "--column")  # refuses one that is not there
        return request.column
    if len(columns) == 1 or request.out.suffix == BUNDLE and columns:
        return columns[0]
    if not columns:
        raise UserError(f"{request.labels}: has ids and nothing else; leave --labels out, or add a column")
    raise UserError(
        f"{request.labels}: has the columns {first_of(columns)}; name the one that colours the points with "
        "--column"
    )


def _cells(cells: Sequence[str], rows: Sequence[int | None], numbers: str) -> list[str]:
    """Return the label of each protein; without one that of a class `MISSING`, which no number is."""
    found = ["" if row is None else cells[row].strip() for row in rows]
    return [MISSING if not cell else _plain(cell, numbers) for cell in found]


def _plain(cell: str, numbers: str) -> str:
    """Return a number as `float` reads it, and any other cell as it is."""
    if numbers == PLAIN:
        return cell
    try:
        return repr(read_number(cell, numbers))
    except ValueError:
        return cell


def _words(labels: Sequence[str]) -> list[str]:
    """Return what is no number in a column of numbers."""
    known = [label for label in labels if label != MISSING]
    numbers = as_numbers(known)
    return [] if numbers is None else [known[n] for n in np.flatnonzero(np.isnan(numbers))]


def _vectors(file: EmbeddingFile, layer: int | None, numbers: Sequence[int]) -> tuple[str, Array]:
    """Return the name of the layer, and a vector for each protein, fp32 ``[n, h]``."""
    kind = POOLED if file.layers[POOLED] else RESIDUE
    names = file.layers[kind]
    name = names[-1] if layer is None else f"layer_{layer}"
    if name not in names:
        known = [name.removeprefix("layer_") for name in names if name.startswith("layer_")]
        cure = f"holds {first_of(known)}; give one of these" if known else "has one layer; leave it out"
        raise UserError(f"--layer {layer}: {file.path} {cure}")
    if kind == POOLED:
        return name, file.pooled(name, numbers)
    residues = (file.residues(name, number) for number in numbers)
    return f"{name}, mean over residues", np.stack([values.mean(axis=0) for values in residues])
