"""Scores a predictor that knows only the training labels: the figures that a model must beat."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.metrics import Metrics, Predictions, metrics_of, objects
from esm2mega.pairs import num_residues, pairs_of

PREFIX = "baseline_"


def baseline_metrics(found: Predictions, info: TargetInfo) -> Metrics:
    """Compute the metrics of a predictor that knows only the training labels.

    It predicts their mean or their class frequencies everywhere, and for contacts their frequency at each
    distance along the chain. Metrics that are not defined for a constant, such as correlations, are left out.

    Args:
        found: Predictions with labels.
        info: Meaning of the labels, with the baseline; checkpoints of earlier versions have no baseline.

    Returns:
        Metrics by name with `PREFIX`.
    """
    if not info.baseline:
        return {}
    known = np.array(info.baseline)
    if info.per_pair:
        # The baseline holds one frequency per separation along the chain, the smallest separation first.
        values = objects(by_separation(known, num_residues(len(x))) for x in found.values)
    else:
        values = np.broadcast_to(known, found.values.shape)
    metrics = metrics_of(replace(found, values=values), info)
    return {f"{PREFIX}{name}": value for name, value in metrics.items() if not math.isnan(value)}


def by_separation(known: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """Return the frequency of contacts at the separation j - i of each pair of a protein, ``[p]``.

    Args:
        known: Frequency at each separation from 0 on; the last one holds for greater ones too.
        length: Number of residues of the protein.
    """
    first, second = pairs_of(length)
    return known[np.minimum(second - first, len(known) - 1)]
