"""Reads the table of predictions of a test split back into arrays, and writes the one for readers.

Predictions of probes, fine-tuned models and baselines pass through one form, that of `esm2mega predict`, so
that all are judged by the same code, and a reader can do it again.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import replacing
from esm2mega.finetune.metrics import Predictions
from esm2mega.finetune.output import table_cells, uncertainty_cells
from esm2mega.finetune.uncertainty import Summary, extra_widths, spread_factor
from esm2mega.report.results.predictions import read_rows

Array = npt.NDArray[Any]

ID = "id"


def read_predictions(path: Path, info: TargetInfo, proteins: LabelledProteins) -> Predictions:
    """Read predictions of proteins in the form of `esm2mega predict`.

    Of classes of residues a table has the likeliest alone, so their values are 1 and 0 in place of
    probabilities: enough for accuracies, not for AUROC.

    Args:
        path: CSV with a row for each protein, in any order.
        info: Meaning of the labels.
        proteins: The proteins with their labels.

    Raises:
        UserError: A protein has no prediction.
    """
    rows = {row[ID]: row for row in read_rows(path)}
    if missing := next((name for name in proteins.ids if name not in rows), None):
        raise UserError(f"{path}: has no prediction for {missing}; make it again")
    found = [rows[name] for name in proteins.ids]
    if not info.per_residue:
        names = info.names if info.kind in NUMERIC_KINDS else [f"p_{name}" for name in info.output_names]
        values = np.array([[float(row[name]) for name in names] for row in found])
        return Predictions(np.arange(len(found)), None, values, proteins.labels)
    lengths = proteins.lengths
    values = np.concatenate([_residues(row, info, int(n)) for row, n in zip(found, lengths, strict=True)])
    numbers = np.concatenate([np.arange(n) for n in lengths])
    return Predictions(np.repeat(np.arange(len(found)), lengths), numbers, values, proteins.labels)


def _residues(row: Mapping[str, str], info: TargetInfo, length: int) -> Array:
    """Return the values of the residues of a protein, ``[L, k]``."""
    parts = []
    for target in info.targets:
        cell = row[target.name if len(info.targets) > 1 else "prediction"]
        if info.kind in NUMERIC_KINDS:
            parts.append(np.array([float(word) for word in cell.split()])[:, None])
            continue
        letters = cell.split() if " " in cell else list(cell)
        parts.append(np.array([[letter == name for name in target.names] for letter in letters], float))
    values = np.concatenate(parts, axis=1)
    if len(values) != length:
        raise UserError(f"{row[ID]}: has {len(values)} predicted residues of {length}; make the table again")
    return values


def write_predictions(
    path: Path, cells: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, str]], columns: Sequence[str]
) -> None:
    """Write ids, labels and predictions of the test proteins.

    Args:
        path: The CSV.
        cells: Cells of the prediction of each protein, by column.
        rows: Row of each protein in the table of labels.
        columns: Columns of the labels; they become ``label``, or ``label/COLUMN`` where there are several.
    """
    labels = {name: "label" if len(columns) == 1 else f"label/{name}" for name in columns}
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [ID, *labels.values(), *cells[0]], lineterminator="\n")
        writer.writeheader()
        for row, predicted in zip(rows, cells, strict=True):
            writer.writerow({ID: row[ID], **{labels[name]: row[name] for name in columns}, **predicted})


def cells_of(found: Predictions, info: TargetInfo, proteins: LabelledProteins) -> list[dict[str, Any]]:
    """Return predictions as cells by column, a row for each protein."""
    values = np.split(found.values, proteins.offsets[1:-1]) if info.per_residue else found.values
    return [table_cells(each, info) for each in values]


def spread_cells(found: Sequence[Predictions], info: TargetInfo) -> list[dict[str, Any]]:
    """Return how far the heads of several seeds differ on each protein, as cells by column.

    They are those of `esm2mega predict` with several runs: standard deviation and 95 % interval.

    Args:
        found: Predictions of each seed.
        info: Meaning of the predictions.

    Returns:
        A row for each protein; none for one seed, for other labels than numbers of proteins, and where all
        heads are the same.
    """
    if len(found) < 2 or info.kind != "regression":
        return []
    summary = Summary(info)
    for each in found:
        summary.add(each.values)
    if not summary.sd.any():
        return []
    arrays = summary.arrays(np.full(info.num_outputs, spread_factor(len(found))))
    extras = {name: arrays[name] for name in extra_widths(info)}
    rows = range(len(summary.mean))
    return [uncertainty_cells({name: array[n] for name, array in extras.items()}, info) for n in rows]
