"""Computes the precision of the likeliest contacts, by the definitions of TAPE and ESM.

A pair counts if it has a label and its separation j - i lies in the range. Of a protein of L residues, the k
likeliest pairs that count are taken, for k = L, L/2 and L/5, rounded down; the precision is the share of
contacts among them. Where fewer than k pairs count, the rest of the k are misses, as in ESM. A protein
without a pair that counts has no precision.

The ranges of j - i are: all from 6 on (``p_at_L5`` of TAPE), and ESM's short [6, 12), medium [12, 24) and
long from 24 on. Means are over proteins; ``_pooled`` is over the pairs of all proteins.
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
    """Count the contacts and the pairs taken for each protein and each of `NAMES`, ``[n, m, 2]``.

    Both are 0 where no pair of a protein counts.

    Args:
        scores: Greater for likelier contacts, such as logits; ``[n]`` arrays ``[p]``, pairs in the order of
            `pairs_of`.
        labels: Labels of these pairs, ``[n]`` arrays ``[p]``.
    """
    counts = [_of_protein(values, found) for values, found in zip(scores, labels, strict=True)]
    return np.array(counts, dtype=np.float64).reshape(-1, len(NAMES), 2)


def contact_metrics(counts: Array) -> dict[str, float]:
    """Return the means over proteins, and pooled values for all ranges together; NaN without any pairs."""
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
        # A stable sort puts the first of equal scores first on every machine.
        likeliest = labels[chosen][np.argsort(-scores[chosen], kind="stable")]
        for part in _PARTS.values():
            k = length // part if len(likeliest) else 0
            counts.append([int((likeliest[:k] == 1).sum()), k])
    return counts
