"""BLOSUM62: the entries of the matrix, and scores against alignments."""

from __future__ import annotations

import numpy as np
import pytest
from Bio.Align import PairwiseAligner, substitution_matrices

from esm2mega.autoeval.baselines.substitutions import (
    blosum62_scores,
    substitution_scores,
    zero_shot_baseline,
)
from esm2mega.config.schema import TaskConfig
from esm2mega.data.labels.dataset import proteins_of_pairs
from esm2mega.data.variants.variant import Substitution
from esm2mega.errors import UserError
from tests.infer_models import LETTERS, random_proteins

WILD = random_proteins([60], seed=5)[0]


def variants() -> list[str]:
    rng, found = np.random.default_rng(1), [WILD]
    for count in (1, 1, 2, 3, 5, 60):
        letters = list(WILD)
        for place in rng.choice(len(WILD), count, replace=False):
            letters[place] = rng.choice(list(LETTERS))
        found.append("".join(letters))
    return found


def test_entries_of_the_published_matrix() -> None:
    """Figure 2 of Henikoff and Henikoff 1992: some entries, and the sum of the diagonal."""

    def entry(wild: str, new: str) -> float:
        return blosum62_scores(wild, [new])[0]

    # Entries less those of no change: V 4, D 6, W 11, A 4, I 4.
    assert entry("V", "A") == 0 - 4
    assert entry("D", "C") == -3 - 6
    assert entry("W", "P") == -4 - 11
    assert entry("A", "W") == -3 - 4
    assert entry("I", "V") == entry("I", "L") + 1 == 3 - 4
    assert entry("D", "E") == 2 - 6
    matrix = substitution_matrices.load("BLOSUM62")
    assert sum(matrix[letter][letter] for letter in LETTERS) == 116


def test_scores_are_those_of_alignments_without_gaps() -> None:
    """And 0 for the wild type, less for others."""
    aligner = PairwiseAligner(mode="global", open_gap_score=-1000, extend_gap_score=-1000)
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")
    found = blosum62_scores(WILD, variants())
    assert found == [aligner.score(WILD, each) - aligner.score(WILD, WILD) for each in variants()]
    assert found[0] == 0 and max(found[1:]) < 0
    changes = [
        tuple(Substitution(i, a, b) for i, (a, b) in enumerate(zip(WILD, each, strict=True)) if a != b)
        for each in variants()
    ]
    assert substitution_scores(changes) == found


def test_other_letters_and_lengths() -> None:
    """Selenocysteine is not in the matrix, and counts as X."""
    assert blosum62_scores("MC", ["MU"]) == blosum62_scores("MC", ["MX"]) == blosum62_scores("mc", ["m?"])
    with pytest.raises(UserError, match="variant 1 has 3 residues, and its wild type 2; BLOSUM62"):
        blosum62_scores("MC", ["MC", "MCC"])


def test_predictions_of_the_test_split() -> None:
    pairs = [(each, float(number)) for number, each in enumerate(variants())]
    test, _ = proteins_of_pairs(pairs, TaskConfig(kind="regression"), None, "test")
    found = zero_shot_baseline(test, WILD)
    assert found.predictions.values[:, 0].tolist() == blosum62_scores(WILD, variants())
    assert found.predictions.labels is test.labels
    assert found.name == "BLOSUM62" and found.note
