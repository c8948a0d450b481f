"""Turns predictions into what a reader wants: per protein, in units of the labels, with class names.

Legend: ``n`` proteins, ``k`` outputs, ``m`` target columns, ``L`` residues of a protein.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.contacts import SEPARATION
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import IGNORED, Target, TargetInfo
from esm2mega.finetune.metrics import Predictions
from esm2mega.pairs import num_residues, pairs_of

Array = npt.NDArray[Any]

_NOTHING = "-"
"""Stands for a residue without a label or prediction."""


def rows_of(found: Predictions) -> list[int]:
    """Return the numbers of the proteins that have predictions, each once."""
    return np.unique(found.rows).tolist()


def shown_predictions(found: Predictions, info: TargetInfo, proteins: LabelledProteins) -> list[Any]:
    """Return the prediction of each protein in the form of its label.

    Several targets are given by column, classes by the likeliest one, and contacts by the L likeliest ones as
    ``[i, j, probability]``.
    """
    if info.per_pair:
        return [_likeliest(logits) for logits in _pair_maps(found, found.values, proteins)]
    if info.per_residue:
        return [
            _by_column(info, [_residues_shown(values[:, x.outputs], x, info.kind) for x in info.targets])
            for values in spread(found, found.values, proteins)
        ]
    return [_shown(values, info) for values in found.values]


def table_cells(values: Array, info: TargetInfo) -> dict[str, Any]:
    """Return the prediction of a protein as cells by column.

    Numbers of a protein and several targets of residues stand in columns with the names of their targets,
    everything else in the column ``prediction``. Classes of a protein come with the probabilities of all.

    Args:
        values: Values of the protein, ``[k]``, or of its residues, ``[L, k]``; NaN where it was cropped.
        info: Meaning of the values.
    """
    if info.per_residue:
        cells = [
            _residue_cell(_residues_shown(values[:, target.outputs], target, info.kind))
            for target in info.targets
        ]
        names = [target.name for target in info.targets] if len(cells) > 1 else ["prediction"]
        return dict(zip(names, cells, strict=True))
    if info.kind == "regression":
        return dict(zip(info.names, values.tolist(), strict=True))
    shown = _shown(values, info)
    named = {f"p_{name}": value for name, value in zip(info.names, values.tolist(), strict=True)}
    return {"prediction": ";".join(shown) if info.kind == "multilabel" else shown, **named}


def rank_columns(info: TargetInfo) -> list[str]:
    """Return the columns of the ranks of numbers of proteins: ``rank``, or ``NAME_rank`` of several."""
    return ["rank"] if len(info.names) == 1 else [f"{name}_rank" for name in info.names]


RankOne = Literal["highest", "lowest"]
"""Says which number has rank 1."""


def ranked(values: Array, first: RankOne) -> Array:
    """Return the rank of each number among those of its output, ``[n, k]``: 1 for `first`.

    Equal numbers have the same rank, that of the first of them.
    """
    ordering = -values if first == "highest" else values
    ordered = np.sort(ordering, axis=0)
    columns = [np.searchsorted(each, column) for each, column in zip(ordered.T, ordering.T, strict=True)]
    return np.stack(columns, axis=1) + 1


def uncertainty_columns(extras: Iterable[str], info: TargetInfo) -> list[str]:
    """Return the columns that say how uncertain predictions are: ``NAME_sd``, or ``entropy`` for one target.

    Args:
        extras: Names of the arrays, from `esm2mega.finetune.uncertainty.extra_widths`.
        info: Meaning of the predictions.
    """
    names = [target.name for target in info.targets]
    if info.kind in ("regression", "multilabel"):
        names = info.names
    elif info.kind == "token_regression" and len(names) == 1:
        names = ["prediction"]
    return [f"{name}_{extra}" if name else extra for name in names for extra in extras]


def uncertainty_cells(values: Mapping[str, Array], info: TargetInfo) -> dict[str, Any]:
    """Return how uncertain the prediction of a protein is, as cells by column.

    Args:
        values: For each array, that of the protein, ``[g]``, or of its residues, ``[L, g]``.
        info: Meaning of the predictions.
    """
    columns = uncertainty_columns(values, info)
    # [extras, g] or [extras, L, g] -> in the order of the columns
    cells = [
        array[..., number]
        for number in range(len(columns) // max(len(values), 1))
        for array in values.values()
    ]
    shown = [_residue_cell(_numbers(cell)) if info.per_residue else cell.item() for cell in cells]
    return dict(zip(columns, shown, strict=True))


def _residue_cell(shown: str | list[float | None]) -> str:
    """Write classes of residues as they are, and numbers of residues with blanks between them."""
    return shown if isinstance(shown, str) else " ".join("nan" if x is None else repr(x) for x in shown)


def shown_labels(found: Predictions, info: TargetInfo, proteins: LabelledProteins) -> list[Any]:
    """Return the label of each protein in the form of `shown_predictions`, contacts as ``[i, j]``.

    A missing label is None, and ``-`` among classes of residues.
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
    """Split values of residues, ``[sum, k]``, into an array ``[L, k]`` per protein; NaN where it was cropped.

    Args:
        found: Predictions, which say the residue of each value.
        values: Values in the order of `found`.
        proteins: Proteins, which give the lengths.
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
    """Return the contact probabilities of each protein as a symmetric map, fp32 ``[L, L]``.

    The map is NaN on the diagonal and where the protein was cropped.
    """
    return map(probabilities, _pair_maps(found, found.values, proteins))


def _pair_maps(found: Predictions, values: Array, proteins: LabelledProteins) -> Iterator[Array]:
    """Yield the values of pairs, ``[n]`` arrays ``[p]``, as a map ``[L, L]`` per protein, see `pair_map`."""
    assert found.numbers is not None
    for row, start, each in zip(found.rows.tolist(), found.numbers.tolist(), values, strict=True):
        yield pair_map(each, start, int(proteins.lengths[row]))


def pair_map(values: Array, start: int, length: int) -> Array:
    """Lay out the values of all pairs of a piece of a protein as a symmetric map, fp32 at least, ``[L, L]``.

    The map is NaN on the diagonal and outside of the piece.

    Args:
        values: Values of the pairs, ``[p]``, in the order of `esm2mega.pairs`.
        start: Number of the first residue of the piece.
        length: Number L of residues of the protein.
    """
    whole = np.full((length, length), np.nan, dtype=np.promote_types(values.dtype, np.float32))
    first, second = pairs_of(num_residues(len(values)))
    whole[first + start, second + start] = values
    whole[second + start, first + start] = values
    return whole


def probabilities(logits: Array) -> Array:
    """Apply the logistic function in fp64 without overflow, and return fp32."""
    x = logits.astype(np.float64)
    return (np.exp(np.minimum(x, 0.0)) / (1.0 + np.exp(-np.abs(x)))).astype(np.float32)


def _likeliest(logits: Array) -> list[Any]:
    """Return the L likeliest contacts, likeliest first, among pairs that are `SEPARATION` or more apart."""
    first, second = np.triu_indices(len(logits), SEPARATION)
    known = ~np.isnan(logits[first, second])
    first, second = first[known], second[known]
    order = np.argsort(-logits[first, second], kind="stable")[: len(logits)]
    first, second = first[order], second[order]
    columns = (first.tolist(), second.tolist(), probabilities(logits)[first, second].tolist())
    return [list(entry) for entry in zip(*columns, strict=True)]


def _shown(values: Array, info: TargetInfo) -> Any:
    if info.kind == "classification":
        return info.names[int(values.argmax())]
    if info.kind == "multilabel":
        return [name for name, value in zip(info.names, values.tolist(), strict=True) if value >= 0.5]
    numbers = _numbers(values)
    return numbers[0] if len(numbers) == 1 else dict(zip(info.names, numbers, strict=True))


def _by_column(info: TargetInfo, shown: Sequence[Any]) -> Any:
    """Return what is shown of each target by column; for a single target without the column."""
    if len(shown) == 1:
        return shown[0]
    return {target.name: each for target, each in zip(info.targets, shown, strict=True)}


def _residues_shown(values: Array, target: Target, kind: str) -> Any:
    """Show the predictions of a target, ``[L, c]`` for c classes or ``[L, 1]`` for numbers."""
    if kind == "token_regression":
        return _numbers(values[:, 0])
    cropped = np.isnan(values[:, 0])
    likeliest = np.where(cropped, 0.0, values.T).T.argmax(axis=1)
    return _residues_known(np.where(cropped, np.nan, likeliest), target, kind)


def _residues_known(labels: Array, target: Target, kind: str) -> Any:
    """Show the labels of a target, ``[L]``, which are numbers or numbers of classes; NaN for none."""
    if kind == "token_regression":
        return _numbers(labels)
    # Classes of one character each are written without blanks between them.
    between = "" if all(len(name) == 1 for name in target.names) else " "
    return between.join(_NOTHING if math.isnan(x) else target.names[int(x)] for x in labels.tolist())


def _numbers(values: Array) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
