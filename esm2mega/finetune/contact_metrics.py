"""Computes the precision of the likeliest contacts, by the definitions of TAPE and ESM.

The k likeliest pairs of a protein of L residues are taken among those that count, for k = L, L/2 and L/5,
rounded down; the share of them that are contacts is the precision. Where fewer than k pairs count, the rest
of the k are misses, as in ESM. A protein with no pair that counts has no precision.

Ranges are of j - i: all from 6 on (``p_at_L5`` of TAPE, medium and long together), and ESM's short [6, 12),
medium [12, 24) and long from 24 on. Means are over proteins; ``_pooled`` is over the pairs of all proteins.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from esm2mega.data.labels.contacts import SEPARATION
from esm2mega.data.labels.schema import IGNORED
from esm2mega.pairs import num_residues, pairs_of

Array = npt.NDArray[np.float64]

_RANGES = {"": (SEPARATION, None), "short_": (6, 12), "medium_": (12, 24), "long_": (24, None)}
_PARTS = {"p_at_L": 1, "p_at_L2": 2, "p_at_L5": 5}

NAMES = [f"{prefix}{name}" for prefix in _RANGES for name in _PARTS]


def contact_counts(scores: npt.NDArray[np.object_], labels: npt.NDArray[np.object_]) -> Array:
    """How many of how many are right, for each protein and each of `NAMES`: ``[n, m, 2]``, 0 of 0 for none.

    Args:
        scores: Greater for likelier contacts, such as logits; ``[n]`` arrays ``[p]``, pairs in the order of
            `pairs_of`.
        labels: The same of labels.
    """
    counts = [_of_protein(values, found) for values, found in zip(scores, labels, strict=True)]
    return np.array(counts, dtype=np.float64).reshape(-1, len(NAMES), 2)


def contact_metrics(counts: Array) -> dict[str, float]:
    """Means over proteins, and pooled for all ranges together; NaN where no protein has pairs."""
    metrics = {}
    for number, name in enumerate(NAMES):
        right, taken = counts[counts[:, number, 1] > 0, number].T
        metrics[name] = float((right / taken).mean()) if len(taken) else math.nan
        if name in _PARTS:
            metrics[f"{name}_pooled"] = float(right.sum() / taken.sum()) if len(taken) else math.nan
    return metrics


def _of_protein(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.int8]) -> list[list[int]]:
    length = num_residues(len(labels))
    first, second = pairs_of(length)
    counts = []
    for low, high in _RANGES.values():
        chosen = (second - first >= low) & (labels != IGNORED)
        if high is not None:
            chosen &= second - first < high
        # The first of equal ones first, whatever the machine.
        likeliest = labels[chosen][np.argsort(-scores[chosen], kind="stable")]
        for part in _PARTS.values():
            k = length // part if len(likeliest) else 0
            counts.append([int((likeliest[:k] == 1).sum()), k])
    return counts
