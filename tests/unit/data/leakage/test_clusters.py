"""Proteins are divided so that no search finds relatives in two parts."""

from __future__ import annotations

import numpy as np
import pytest

from esm2mega.data.leakage.clusters import divide_apart
from esm2mega.data.leakage.leaks import KMERS, MMSEQS, find_leaks
from esm2mega.data.leakage.mmseqs import find_mmseqs

LETTERS = list("LAGVSERTIDPKQNFYMHWC")
METHODS = [
    KMERS,
    pytest.param(
        MMSEQS,
        marks=[
            # Every search by MMseqs2 takes a second or more.
            pytest.mark.slow,
            pytest.mark.skipif(find_mmseqs() is None, reason="MMseqs2 is not installed"),
        ],
    ),
]


def families(sizes: list[int], seed: int) -> tuple[list[str], list[int]]:
    """Return proteins of families whose members differ from their founder in a tenth of the residues."""
    rng = np.random.default_rng(seed)
    found, owners = [], []
    for family, size in enumerate(sizes):
        founder = rng.choice(LETTERS, 80)
        for _ in range(size):
            member = founder.copy()
            places = rng.choice(80, 8, replace=False)
            member[places] = rng.choice(LETTERS, 8)
            found.append("".join(member))
            owners.append(family)
    return found, owners


@pytest.mark.parametrize("method", METHODS)
def test_no_relatives_are_in_two_parts_and_unrelated_ones_are_no_group(method: str) -> None:
    """A family of 40 is larger than the number of relatives that a search names."""
    sequences, owners = families([40, 5, 5, 3, 1, 1, 1, 1], seed=1)

    def halves(groups: np.ndarray) -> np.ndarray:
        numbers = np.unique(groups, return_inverse=True)[1]
        return numbers % 2

    parts, groups, used = divide_apart(sequences, 0.5, halves, method)
    assert used == method
    assert len({(owner, group) for owner, group in zip(owners, groups.tolist(), strict=True)}) == 8
    assert len(set(groups.tolist())) == 8
    named = [[(str(i), s) for i, s in enumerate(sequences) if parts[i] == part] for part in (0, 1)]
    assert all(named)
    assert find_leaks({"train": named[0], "test": named[1]}, 0.5, method=method).num_pairs == 0


def test_groups_that_a_first_search_left_apart_are_joined_when_the_parts_are_compared(monkeypatch) -> None:
    """The search among all names no pair here; only that between the parts does."""
    sequences, _ = families([4, 4], seed=2)
    calls = []

    def hits(first: list[str], second: list[str], *_: float) -> tuple[np.ndarray, np.ndarray, bool]:
        calls.append((len(first), len(second)))
        if len(calls) == 1:
            return np.zeros((0, 2), dtype=np.int64), np.zeros(0), False
        pairs = [(i, j) for i, a in enumerate(first) for j, b in enumerate(second) if a[:1] == b[:1]]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2), np.ones(len(pairs)), False

    monkeypatch.setattr("esm2mega.data.leakage.clusters.kmer_hits", hits)
    parts, groups, _ = divide_apart(sequences, 0.5, lambda g: np.unique(g, return_inverse=True)[1] % 2, KMERS)
    assert len(calls) > 2
    first = [sequence[0] for sequence in sequences]
    for letter in set(first):
        assert len({part for part, own in zip(parts.tolist(), first, strict=True) if own == letter}) == 1
    assert len(set(groups.tolist())) < 8
