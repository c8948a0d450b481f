"""Scores variants by BLOSUM62, which knows how often residues replace each other in related proteins.

The matrix is that of Henikoff and Henikoff (1992) as NCBI distributes it, from Biopython.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from esm2mega.autoeval.baselines.fit import Baseline
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.variants.variant import Variant
from esm2mega.errors import UserError
from esm2mega.finetune.metrics import Predictions
from esm2mega.vocabulary import VOCAB

BLOSUM62 = "BLOSUM62"

_LETTER = np.array([token if len(token) == 1 else "X" for token in VOCAB])


def blosum62_scores(wild_type: str, variants: Sequence[str]) -> list[float]:
    """Score variants by the alignment with their wild type, less that of the wild type with itself.

    That is the sum of ``matrix[wild][new] - matrix[wild][wild]`` over the residues that change: 0 for the
    wild type, and less for any other. A letter that the matrix lacks counts as X.

    Args:
        wild_type: Sequence of the wild type.
        variants: Sequences of the same length.

    Raises:
        UserError: A variant has another length.
    """
    table, numbers = _matrix()
    wild, scores = numbers(wild_type), []
    own = table[wild, wild]
    for row, variant in enumerate(variants):
        if len(variant) != len(wild_type):
            raise UserError(
                f"variant {row} has {len(variant)} residues, and its wild type {len(wild_type)}; BLOSUM62 "
                "compares sequences of one length: leave variants with insertions and deletions out"
            )
        scores.append(float((table[wild, numbers(variant)] - own).sum()))
    return scores


def substitution_scores(variants: Sequence[Variant]) -> list[float]:
    """Score variants that are written as changes, as `blosum62_scores` scores their sequences."""
    table, numbers = _matrix()
    scores = []
    for variant in variants:
        wild = numbers("".join(change.wild for change in variant))
        new = numbers("".join(change.mutant for change in variant))
        scores.append(float((table[wild, new] - table[wild, wild]).sum()) if variant else 0.0)
    return scores


def _matrix() -> tuple[npt.NDArray[np.float64], Callable[[str], list[int]]]:
    """Return the matrix, and what gives the row of each letter of a sequence."""
    from Bio.Align import substitution_matrices

    matrix = substitution_matrices.load(BLOSUM62)
    number = {letter: matrix.alphabet.index(letter) for letter in matrix.alphabet}
    other = number["X"]
    return np.array(matrix), lambda sequence: [number.get(letter, other) for letter in sequence.upper()]


def zero_shot_baseline(test: LabelledProteins, wild_type: str) -> Baseline:
    """Predict the test split of variants of one protein without any training.

    Args:
        test: Variants of one length with measured numbers.
        wild_type: Sequence of the wild type.
    """
    sequences = ["".join(_LETTER[test.residues(row)]) for row in range(len(test))]
    values = np.array(blosum62_scores(wild_type, sequences))[:, None]
    found = Predictions(np.arange(len(test)), None, values, test.labels)
    return Baseline(BLOSUM62, found, "a score in no unit, so that correlations alone mean something")
