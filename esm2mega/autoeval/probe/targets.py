"""Fits a head to each target of a task, and joins what the heads predict.

Legend: ``n`` proteins or residues, ``h`` width of their vectors, ``m`` columns of labels, ``k`` outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.autoeval.probe.heads import Examples, Head, fit_head
from esm2mega.autoeval.probe.labels import TRAIN, VALID
from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.errors import UserError

Array = npt.NDArray[Any]


def label_columns(labels: Array | None) -> Array:
    """Return labels of proteins with a column for each target, or for each flag of multilabel, ``[n, m]``."""
    assert labels is not None
    return labels[:, None] if labels.ndim == 1 else labels


def fit_targets(
    head: str,
    info: TargetInfo,
    seed: int,
    data: Mapping[str, tuple[Any, Array]],
    paths: Mapping[str, Path],
) -> tuple[list[Head], list[dict[str, float]]]:
    """Fit a head to each column of labels, whose missing ones do not count.

    Args:
        head: Name of the head, as for `fit_head`.
        info: Meaning of the labels.
        seed: Seed of what is drawn.
        data: Vectors ``[n, h]``, also sparse, and labels ``[n, m]`` of the splits `TRAIN` and `VALID`.
        paths: Where these splits come from, for messages.

    Returns:
        The heads, and what was chosen for each.

    Raises:
        UserError: A column has no label in one of the splits.
    """
    heads, chosen = [], []
    num_columns = data[TRAIN][1].shape[1]
    for column in range(num_columns):
        num_classes = _num_classes(info, column)
        examples = {name: _labelled(*data[name], column, num_classes is None) for name in (TRAIN, VALID)}
        for name, each in examples.items():
            if not len(each.labels):
                raise UserError(f"{paths[name]} ({name}): {_name(info, column)} has no label; give some")
        found, settings = fit_head(head, examples[TRAIN], examples[VALID], num_classes, seed)
        heads.append(found)
        chosen.append(settings)
    return heads, chosen


def _num_classes(info: TargetInfo, column: int) -> int | None:
    if info.kind in NUMERIC_KINDS:
        return None
    return 2 if info.kind == "multilabel" else len(info.targets[column].names)


def _name(info: TargetInfo, column: int) -> str:
    """Return what a message calls a column of labels."""
    name = info.names[column] if info.kind == "multilabel" else info.targets[column].name
    return repr(name) if name else "the column of labels"


def _labelled(vectors: Any, labels: Array, column: int, is_number: bool) -> Examples:
    each = labels[:, column]
    # Flags of multilabel are numbers that are NaN where there is none, classes are integers.
    there = ~np.isnan(each) if each.dtype.kind == "f" else each != IGNORED
    kept = each[there] if is_number else each[there].astype(np.int64)
    return Examples(vectors[there], kept)


def predict_targets(info: TargetInfo, heads: Sequence[Head], vectors: Any) -> Array:
    """Return the outputs of all targets, ``[n, k]``; of a flag the probability of 1."""
    values = [head.predict(vectors) for head in heads]
    return np.concatenate([each[:, 1:] for each in values] if info.kind == "multilabel" else values, axis=1)
