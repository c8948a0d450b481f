"""The matrices of baselines against those of scikit-learn and against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from esm2mega.autoeval.baselines.features import HALF_WINDOW, K_MERS, OneHot, k_mers, windows
from esm2mega.data.labels.dataset import LabelledProteins, proteins_of_sequences
from tests.infer_models import LETTERS, random_proteins

OTHER = "X"
SEQUENCES = [*random_proteins([1, 2, 3, 7, 30, 120]), "MKXMKUMK-MK", "AAAA", "A"]


def proteins() -> LabelledProteins:
    return proteins_of_sequences(SEQUENCES)


@pytest.mark.parametrize("k", K_MERS)
def test_k_mers_are_those_of_scikit_learn(k: int) -> None:
    letters = LETTERS + OTHER
    words = ["".join(word) for word in itertools.product(letters, repeat=k)]
    counter = CountVectorizer(analyzer="char", ngram_range=(k, k), lowercase=False, vocabulary=words)
    texts = ["".join(c if c in LETTERS else OTHER for c in sequence) for sequence in SEQUENCES]
    counts = counter.transform(texts).toarray()
    assert counts.sum() == sum(max(0, len(text) - k + 1) for text in texts)
    first = sum(len(letters) ** shorter for shorter in K_MERS if shorter < k)
    found = k_mers(proteins())[:, first : first + len(words)].toarray()
    expected = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    # The values are fp32.
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_windows_hold_each_neighbour_and_the_ends() -> None:
    chosen = np.array([0, 1, 2, 5, 6, 20, 40, 162, 163, 178])
    found = windows(proteins(), chosen).toarray().reshape(len(chosen), 2 * HALF_WINDOW + 1, -1)
    assert (found.sum(axis=2) == 1).all()
    places = [(sequence, place) for sequence in SEQUENCES for place in range(len(sequence))]
    alphabet = LETTERS + OTHER + "|"
    for row, number in enumerate(chosen.tolist()):
        sequence, place = places[number]
        shown = "".join(alphabet[column] for column in found[row].argmax(axis=1))
        text = "".join(c if c in LETTERS else OTHER for c in sequence)
        padded = "|" * HALF_WINDOW + text + "|" * HALF_WINDOW
        assert shown == padded[place : place + 2 * HALF_WINDOW + 1]


def test_one_hot_has_columns_for_what_varies_in_training() -> None:
    """One for each residue of a position; a residue that training did not have there has none."""
    encode = OneHot(proteins_of_sequences(["MKTA", "MRTA", "MRTC", "MKTU"]))
    train = encode(proteins_of_sequences(["MKTA", "MRTU", "MWTC"])).toarray()
    assert train.shape == (3, 2 + 3)
    assert train.sum(axis=1).tolist() == [2, 2, 1]
    assert len(np.unique(train, axis=0)) == 3
    alike = OneHot(proteins_of_sequences(["MKTA", "MKTA"]))
    assert alike(proteins_of_sequences(["MWTA"])).toarray().tolist() == [[0.0]]
