"""Scores all assays of a ProteinGym reference file, and writes the summary that the benchmark reports.

ProteinGym (https://github.com/OATML-Markslab/ProteinGym) has a reference file with a row per assay (``DMS_id,
DMS_filename, UniProt_ID, target_seq, coarse_selection_type``), and a CSV per assay (``mutant,
mutated_sequence, DMS_score``). Residues count from 1. The summary is a mean of means: over the assays of a
protein (UniProt id), over the proteins of a class of function, and over the classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, read_json, write_json
from esm2mega.infer.score import ScoreOptions, check_columns, clean, measured_spearman, scorer, write_scored
from esm2mega.infer.target import Mode
from esm2mega.infer.variants import (
    Table,
    Variant,
    parse_variant,
    read_table,
    write_table,
)
from esm2mega.infer.work import differing
from esm2mega.parallel.errors import on_one_rank

SUMMARY = "summary.csv"
_SETTINGS = "settings.json"
_MEASURED = "DMS_score"


class Assay(NamedTuple):
    """Holds a row of the reference file."""

    id: str
    table: Path
    protein: str
    sequence: str
    function: str


def read_reference(path: str, assays: str) -> list[Assay]:
    """Read the assays of a reference file.

    Args:
        path: The reference file.
        assays: Folder of the assays' tables.

    Raises:
        UserError: A column or a table is missing, or two assays have the same id.
    """
    reference = read_table(path)
    names = ("DMS_id", "DMS_filename", "UniProt_ID", "target_seq", "coarse_selection_type")
    columns = [reference.column(name, "--proteingym") for name in names]
    found = []
    for row, (name, file, protein, sequence, function) in enumerate(zip(*columns, strict=True)):
        table = Path(assays) / Path(file).name
        if not table.is_file():
            raise UserError(f"{reference.location(row)}: there is no {table}; name the folder with --assays")
        found.append(Assay(name, table, protein, clean(sequence), function))
    if len({assay.id for assay in found}) < len(found):
        raise UserError(f"{path}: a DMS_id occurs twice; remove one of the rows")
    return found


def score_assays(
    checkpoint: str, assays: Sequence[Assay], out: str, options: ScoreOptions, mode: Mode = "new"
) -> list[str]:
    """Score every assay into ``OUT/DMS_id.csv``.

    Args:
        checkpoint: A checkpoint, run directory, or anything that `esm2mega convert` reads.
        assays: The assays, from `read_reference`.
        out: Folder of the output.
        options: How variants are scored; the columns are those of ProteinGym.
        mode: What to do about an output that exists already. ``resume`` takes finished tables as they are, if
            they were made with the same weights and settings.

    Returns:
        A report for the reader.

    Raises:
        UserError: The folder is not empty, and `mode` does not allow for what it holds.
    """
    options = replace(options, offset=1, mutation_column="mutant", measured_column=_MEASURED)
    folder = Path(out)
    _check_existing(folder, mode)
    results = []
    with scorer(checkpoint, options) as (score, ranks):
        tables = [folder / f"{Path(assay.id).name}.csv" for assay in assays]
        done = on_one_rank(lambda: _begin(folder, tables, score.settings(), mode))
        for assay, path in zip(assays, tables, strict=True):
            table = read_table(assay.table)
            if path in done:
                scores = _finished(path, table, options)
            else:
                check_columns(table, options)
                scores = score(assay.sequence, _variants(table, assay, options))
                if ranks.is_main:
                    write_scored(path, table, scores, options)
            number, value = measured_spearman(table, scores, _MEASURED)
            results.append((assay, number, value))
        if ranks.is_main:
            columns = ["DMS_id", "UniProt_ID", "coarse_selection_type", "variants", "spearman"]
            rows = [[a.id, a.protein, a.function, number, repr(value)] for a, number, value in results]
            write_table(folder / SUMMARY, columns, rows)
    mean = mean_of_means([(assay.function, assay.protein, value) for assay, _, value in results])
    return [
        *(f"{assay.id}: Spearman {value:.4f} over {number:,} variants" for assay, number, value in results),
        f"{folder / SUMMARY}: {len(results):,} assays, mean Spearman {mean:.4f}",
    ]


def _check_existing(folder: Path, mode: Mode) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        if mode == "new":
            raise UserError(
                f"{folder}: is not empty; go on with --resume, replace its tables with --overwrite, or "
                "choose another --out"
            )
        if mode == "resume" and not (folder / _SETTINGS).is_file():
            raise UserError(
                f"{folder}: has no {_SETTINGS}, which says how its tables were made; choose another --out"
            )


def _begin(folder: Path, tables: Sequence[Path], settings: dict[str, Any], mode: Mode) -> list[Path]:
    """Write down the settings, or compare them with earlier ones, and return the tables that are finished."""
    noted = folder / _SETTINGS
    if mode == "resume" and noted.is_file():
        if differences := differing(read_json(noted, "begin again with --overwrite"), settings):
            raise UserError(
                f"{folder}: begun with other settings: {differences}; set them back, or begin again with "
                "--overwrite"
            )
    else:
        # Nothing of an earlier start may be taken for a result of this one.
        for path in [folder / SUMMARY, *tables]:
            path.unlink(missing_ok=True)
        write_json(noted, settings, OTHER_OUT)
    return [path for path in tables if path.is_file()]


def _finished(path: Path, table: Table, options: ScoreOptions) -> list[float]:
    """Read the scores of a table that an earlier start wrote."""
    written = read_table(path)
    if [row[:-1] for row in written.rows] != table.rows:
        raise UserError(f"{path}: holds other rows than {table.path}; begin again with --overwrite")
    return [float(text) for text in written.column(options.score_column, "--score-column")]


def _variants(table: Table, assay: Assay, options: ScoreOptions) -> list[Variant]:
    variants = []
    for row, text in enumerate(table.column(options.mutation_column, "--proteingym")):
        try:
            variants.append(parse_variant(text, assay.sequence, options.offset))
        except UserError as error:
            raise UserError(f"{table.location(row)}: {error}") from None
    return variants


def mean_of_means(values: Sequence[tuple[str, str, float]]) -> float:
    """Return the mean over classes of the mean over proteins of the mean over assays.

    Args:
        values: Class, protein and value of each assay.
    """
    classes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for function, protein, value in values:
        classes[function][protein].append(value)
    means = [_mean([_mean(assays) for assays in proteins.values()]) for proteins in classes.values()]
    return _mean(means)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
