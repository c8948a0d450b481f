"""Scores all assays of a ProteinGym reference file, and writes the summary that the benchmark reports.

ProteinGym (https://github.com/OATML-Markslab/ProteinGym) has a reference file with a row per assay (``DMS_id,
DMS_filename, UniProt_ID, target_seq, coarse_selection_type``), and a CSV per assay (``mutant,
mutated_sequence, DMS_score``), which for insertions and deletions has no ``mutant``. Residues count from 1.
The summary is a mean of means: over the assays of a protein (UniProt id), over the proteins of a class of
function, and over the classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from esm2mega.data.readers.base import require_columns
from esm2mega.data.variants.wild_types import WildType, clean
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, read_json, write_json
from esm2mega.infer.plan import Plan, ScoreOptions, measured, plan_table
from esm2mega.infer.score import Scored, described, measured_spearman, scorer, write_scored
from esm2mega.infer.target import Mode
from esm2mega.infer.variant_tables import Table, read_table, write_table
from esm2mega.infer.work import differing
from esm2mega.parallel.errors import on_one_rank

SUMMARY = "summary.csv"
_SETTINGS = "settings.json"
MEASURED = "DMS_score"


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
        UserError: A column or a table is missing, a cell cannot be used, or two assays have the same id.
    """
    reference = read_table(path)
    names = ("DMS_id", "DMS_filename", "UniProt_ID", "target_seq", "coarse_selection_type")
    require_columns(path, reference.columns, names, "is it the reference file of ProteinGym?")
    columns = [reference.column(name, "--proteingym") for name in names]
    found = []
    for row, (name, file, protein, sequence, function) in enumerate(zip(*columns, strict=True)):
        table = Path(assays) / Path(file).name
        if not table.is_file():
            raise UserError(f"{reference.location(row)}: there is no {table}; name the folder with --assays")
        if Path(name).name != name or f"{name}.csv" == SUMMARY:
            raise UserError(f"{reference.location(row)}: DMS_id {name!r} cannot name a table; give another")
        try:
            found.append(Assay(name, table, protein, clean(sequence), function))
        except UserError as error:
            raise UserError(f"{reference.location(row)}: target_seq: {error}") from None
    if len({assay.id for assay in found}) < len(found):
        raise UserError(f"{path}: a DMS_id occurs twice; remove one of the rows")
    return found


def score_assays(
    checkpoint: str, assays: Sequence[Assay], out: str, options: ScoreOptions, mode: Mode = "new"
) -> list[str]:
    """Score every assay into ``OUT/DMS_id.csv``.

    All tables are checked before the model is loaded. They are read again when their turn comes, since those
    of the benchmark would take gigabytes of memory together.

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
        UserError: A row of an assay cannot be scored, or the folder is not empty, and `mode` does not allow
            for what it holds.
    """
    options = replace(options, offset=1, offset_name="", mutation_column="mutant", measured_column=MEASURED)
    folder = Path(out)
    _check_existing(folder, mode)
    on_one_rank(lambda: _check_assays(assays, options))
    tables = [folder / f"{assay.id}.csv" for assay in assays]
    results, notes = [], []
    with scorer(checkpoint, options) as (score, ranks):
        done = on_one_rank(lambda: _begin(folder, assays, tables, score.settings(), mode))
        for assay, path in zip(assays, tables, strict=True):
            plan = plan_assay(assay, options)
            if path in done:
                scored = _finished(path, plan, options)
            else:
                scored = score(plan)
                if ranks.is_main:
                    write_scored(path, plan, scored, options)
            assert plan.table is not None
            number, value = measured_spearman(scored, measured(plan.table, MEASURED))
            results.append((assay, number, value))
            notes += [f"{assay.id}: {line}" for line in described(plan)]
        if ranks.is_main:
            columns = ["DMS_id", "UniProt_ID", "coarse_selection_type", "variants", "spearman"]
            rows = [[a.id, a.protein, a.function, number, repr(value)] for a, number, value in results]
            write_table(folder / SUMMARY, columns, rows)
    mean = mean_of_means([(assay.function, assay.protein, value) for assay, _, value in results])
    return [
        *notes,
        *(f"{assay.id}: Spearman {value:.4f} over {number:,} variants" for assay, number, value in results),
        f"{folder / SUMMARY}: {len(results):,} assays, mean Spearman {mean:.4f}",
        score.computing,
    ]


def plan_assay(assay: Assay, options: ScoreOptions) -> Plan:
    """Read the table of an assay, and check every row of it; see `plan_table`."""
    table = read_table(assay.table)
    require_columns(str(assay.table), table.columns, [MEASURED], "is it a table of ProteinGym?")
    return plan_table(table, [WildType(assay.id, assay.sequence)], options)


def _check_assays(assays: Sequence[Assay], options: ScoreOptions) -> None:
    """Raise `UserError` for the first row of any assay that cannot be scored."""
    for assay in assays:
        plan_assay(assay, options)


def _check_existing(folder: Path, mode: Mode) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        if mode == "new":
            raise UserError(
                f"{folder}: is not empty; continue with --resume, replace its tables with --overwrite, or "
                "choose another --out"
            )
        if mode == "resume" and not (folder / _SETTINGS).is_file():
            raise UserError(
                f"{folder}: has no {_SETTINGS}, which says how its tables were made; choose another --out"
            )


def _begin(
    folder: Path, assays: Sequence[Assay], tables: Sequence[Path], settings: dict[str, Any], mode: Mode
) -> list[Path]:
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
    done = [(assay, path) for assay, path in zip(assays, tables, strict=True) if path.is_file()]
    for assay, path in done:
        _check_finished(path, read_table(assay.table))
    return [path for _, path in done]


def _check_finished(path: Path, table: Table) -> None:
    """Refuse a table of an earlier start whose rows are not those of the assay."""
    written, width = read_table(path), len(table.columns)
    if written.columns[:width] != table.columns or [row[:width] for row in written.rows] != table.rows:
        raise UserError(f"{path}: holds other rows than {table.path}; begin again with --overwrite")


def _finished(path: Path, plan: Plan, options: ScoreOptions) -> Scored:
    """Read the scores of a table that an earlier start wrote."""
    written, columns = read_table(path), plan.columns(options)
    cells = zip(*(written.column(name, "--score-column") for name in columns), strict=True)
    return Scored(columns, [None if "" in row else [float(text) for text in row] for row in cells])


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
