"""Predictions of a task as a reader wants them: per protein, in units of the labels, with class names.

Legend: ``n`` proteins, ``k`` outputs, ``m`` target columns, ``L`` residues of a protein.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.contacts import SEPARATION
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import IGNORED, Target, TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, replacing
from esm2mega.finetune.metrics import Predictions
from esm2mega.pairs import num_residues, pairs_of

Array = npt.NDArray[Any]

FORMATS = (".csv", ".parquet", ".h5")

_NOTHING = "-"
"""Stands for a residue without label or prediction."""


def rows_of(found: Predictions) -> list[int]:
    """The proteins that there are predictions of, each once."""
    return np.unique(found.rows).tolist()


def shown_predictions(found: Predictions, info: TargetInfo, proteins: LabelledProteins) -> list[Any]:
    """The prediction of each protein in the form of its label, of several targets by their columns; of
    classes the likeliest one, of contacts the L likeliest ones as ``[i, j, probability]``.
    """
    if info.per_pair:
        return [_likeliest(logits) for logits in _pair_maps(found, found.values, proteins)]
    if info.per_residue:
        return [
            _by_column(info, [_residues_shown(values[:, x.outputs], x, info.kind) for x in info.targets])
            for values in spread(found, found.values, proteins)
        ]
    return [_shown(values, info) for values in found.values]


def shown_labels(found: Predictions, info: TargetInfo, proteins: LabelledProteins) -> list[Any]:
    """The label of each protein in the same form, contacts as ``[i, j]``; None or ``-`` where there is
    none.
    """
    labels = found.labels
    assert labels is not None
    if info.per_pair:
        maps = _pair_maps(found, labels, proteins)
        return [np.argwhere(np.triu(known, 1) == 1.0).tolist() for known in maps]
    if info.per_residue:
        numbers = np.where(labels == IGNORED, np.nan, labels) if info.kind not in NUMERIC_KINDS else labels
        return [
            _by_column(
                info, [_residues_known(values[:, i], x, info.kind) for i, x in enumerate(info.targets)]
            )
            for values in spread(found, numbers, proteins)
        ]
    if info.kind == "classification":
        return [None if label == IGNORED else info.names[label] for label in labels.tolist()]
    return [_shown(row, info) for row in labels]


def spread(found: Predictions, values: Array, proteins: LabelledProteins) -> list[Array]:
    """Values of residues, ``[sum, k]``, as one array ``[L, k]`` for each protein; NaN where it was cropped.

    Args:
        found: Which residue each value is of.
        values: In its order.
        proteins: For the lengths.
    """
    assert found.numbers is not None
    arrays = []
    for row in rows_of(found):
        first, end = np.searchsorted(found.rows, [row, row + 1])
        whole = np.full((int(proteins.lengths[row]), values.shape[1]), np.nan)
        whole[found.numbers[first:end]] = values[first:end]
        arrays.append(whole)
    return arrays


def contact_maps(found: Predictions, proteins: LabelledProteins) -> Iterator[Array]:
    """The probabilities of each protein as a symmetric map, fp32 ``[L, L]``; NaN on the diagonal and where it
    was cropped.
    """
    return map(_probabilities, _pair_maps(found, found.values, proteins))


def _pair_maps(found: Predictions, values: Array, proteins: LabelledProteins) -> Iterator[Array]:
    """Values of pairs, ``[n]`` arrays ``[p]``, as a symmetric map ``[L, L]`` of each protein, fp32 at least;
    NaN on the diagonal and where it was cropped.
    """
    assert found.numbers is not None
    for row, start, each in zip(found.rows.tolist(), found.numbers.tolist(), values, strict=True):
        length = int(proteins.lengths[row])
        whole = np.full((length, length), np.nan, dtype=np.promote_types(each.dtype, np.float32))
        first, second = pairs_of(num_residues(len(each)))
        whole[first + start, second + start] = each
        whole[second + start, first + start] = each
        yield whole


def _probabilities(logits: Array) -> Array:
    """The logistic function, computed in fp64 without overflow; fp32."""
    x = logits.astype(np.float64)
    return (np.exp(np.minimum(x, 0.0)) / (1.0 + np.exp(-np.abs(x)))).astype(np.float32)


def _likeliest(logits: Array) -> list[Any]:
    """The L likeliest contacts of pairs that count, likeliest first."""
    first, second = np.triu_indices(len(logits), SEPARATION)
    known = ~np.isnan(logits[first, second])
    first, second = first[known], second[known]
    order = np.argsort(-logits[first, second], kind="stable")[: len(logits)]
    first, second = first[order], second[order]
    columns = (first.tolist(), second.tolist(), _probabilities(logits)[first, second].tolist())
    return [list(entry) for entry in zip(*columns, strict=True)]


def _shown(values: Array, info: TargetInfo) -> Any:
    if info.kind == "classification":
        return info.names[int(values.argmax())]
    if info.kind == "multilabel":
        return [name for name, value in zip(info.names, values.tolist(), strict=True) if value >= 0.5]
    numbers = _numbers(values)
    return numbers[0] if len(numbers) == 1 else dict(zip(info.names, numbers, strict=True))


def _by_column(info: TargetInfo, shown: Sequence[Any]) -> Any:
    """What is shown of each target by its column; of a single one without."""
    if len(shown) == 1:
        return shown[0]
    return {target.name: each for target, each in zip(info.targets, shown, strict=True)}


def _residues_shown(values: Array, target: Target, kind: str) -> Any:
    """Of predictions of a target, ``[L, c]`` of c classes or ``[L, 1]`` of numbers."""
    if kind == "token_regression":
        return _numbers(values[:, 0])
    cropped = np.isnan(values[:, 0])
    likeliest = np.where(cropped, 0.0, values.T).T.argmax(axis=1)
    return _residues_known(np.where(cropped, np.nan, likeliest), target, kind)


def _residues_known(labels: Array, target: Target, kind: str) -> Any:
    """Of labels of a target, ``[L]``, or of the numbers of classes; NaN for none."""
    if kind == "token_regression":
        return _numbers(labels)
    # Nothing between the classes of residues if each is a character, else a blank.
    between = "" if all(len(name) == 1 for name in target.names) else " "
    return between.join(_NOTHING if math.isnan(x) else target.names[int(x)] for x in labels.tolist())


def _numbers(values: Array) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def check_kind(out: Path, info: TargetInfo) -> None:
    """Refuse a table for what fits into none."""
    if out.suffix == ".h5":
        return
    if info.per_pair:
        raise UserError(f"--out {out}: contacts are maps of all pairs; give a name that ends with .h5")
    names = info.names if info.kind == "regression" else [target.name for target in info.targets]
    for name in ("id", "truncated"):
        if name in names:
            raise UserError(
                f"--out {out}: {name!r} is a column of its own in this table and the name of a target; give "
                "a name that ends with .h5"
            )


def check_format(out: Path) -> None:
    """Refuse a name that tells no format, before the work is done."""
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: unknown ending {out.suffix!r}; give one of {', '.join(FORMATS)}")
    if out.suffix == ".parquet":
        from esm2mega.infer.exports import check_parquet

        check_parquet()


def write_predictions(
    out: Path, found: Predictions, info: TargetInfo, proteins: LabelledProteins, limit: int
) -> None:
    """Write one row per protein, in input order.

    Args:
        out: CSV, Parquet or HDF5; complete as soon as it has its name.
        found: Predictions of all proteins.
        info: What they mean.
        proteins: Their ids and lengths.
        limit: Residues that are kept of longer proteins, which are marked as truncated.
    """
    with replacing(out, OTHER_OUT) as partial:
        if out.suffix == ".h5":
            _write_hdf5(partial, found, info, proteins, limit)
        else:
            columns = _columns(found, info, proteins, limit)
            (_write_csv if out.suffix == ".csv" else _write_parquet)(partial, columns)


def _columns(
    found: Predictions, info: TargetInfo, proteins: LabelledProteins, limit: int
) -> dict[str, list[Any]]:
    """Cells by column: id, whether truncated, predictions (numbers and several targets under the names of
    their columns), and probabilities of proteins.
    """
    columns: dict[str, list[Any]] = {
        "id": list(proteins.ids),
        "truncated": (proteins.lengths > limit).tolist(),
    }
    shown = shown_predictions(found, info, proteins)
    if info.kind == "regression":
        return columns | {name: found.values[:, i].tolist() for i, name in enumerate(info.names)}
    if info.per_residue and len(info.targets) > 1:
        return columns | {x.name: [_residue_cell(each[x.name]) for each in shown] for x in info.targets}
    if info.kind == "multilabel":
        columns["prediction"] = [";".join(names) for names in shown]
    else:
        columns["prediction"] = [_residue_cell(each) for each in shown] if info.per_residue else shown
    if not info.per_residue:
        columns |= {f"p_{name}": found.values[:, i].tolist() for i, name in enumerate(info.names)}
    return columns


def _residue_cell(shown: str | list[float | None]) -> str:
    """Classes of residues, or their numbers with blanks between."""
    return shown if isinstance(shown, str) else " ".join("nan" if x is None else repr(x) for x in shown)


def _write_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _write_hdf5(
    path: Path, found: Predictions, info: TargetInfo, proteins: LabelledProteins, limit: int
) -> None:
    """``ids``, ``lengths``, ``truncated``; ``predictions`` ``[n, k]``, or ``[sum L, k]`` with ``offsets``; of
    contacts ``contacts`` ``[sum L * L]`` with ``contact_offsets``, as `esm2mega embed` writes them.
    """
    import h5py

    values: Sequence[Array] = [found.values]
    if info.per_pair:
        with h5py.File(path, "w") as file:
            _write_header(file, info, proteins, limit)
            borders = np.cumsum([0, *(proteins.lengths**2).tolist()])
            file["contact_offsets"] = borders
            contacts = file.create_dataset("contacts", (int(borders[-1]),), np.float32)
            for number, probabilities in enumerate(contact_maps(found, proteins)):
                contacts[borders[number] : borders[number + 1]] = probabilities.ravel()
        return
    if info.per_residue:
        values = spread(found, found.values, proteins)
    with h5py.File(path, "w") as file:
        _write_header(file, info, proteins, limit)
        file["predictions"] = np.concatenate(values)
        if info.per_residue:
            file["offsets"] = proteins.offsets


def _write_header(file: Any, info: TargetInfo, proteins: LabelledProteins, limit: int) -> None:
    import h5py

    file["ids"] = np.array(proteins.ids, dtype=h5py.string_dtype())
    file["lengths"] = proteins.lengths
    file["truncated"] = proteins.lengths > limit
    file.attrs["kind"], file.attrs["names"] = info.kind, info.output_names
    if info.columns:
        file.attrs["columns"], file.attrs["widths"] = info.columns, info.widths
