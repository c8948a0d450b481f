"""Proteins of a benchmark: their lengths, and batches that are those of fair-esm's own script."""

from __future__ import annotations

import numpy as np
import pytest

from esm2mega.benchmark.proteins import (
    PADDED_TOKENS,
    Protein,
    draw,
    draw_batches,
    extract_batches,
    random_residues,
    read_proteins,
    uniref_lengths,
)
from esm2mega.errors import UserError
from tests.infer_models import random_proteins, write_fasta

LENGTHS = [5, 900, 44, 700, 60, 31, 300, 299, 12, 1000, 20, 77]


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> list[Protein]:
    path = tmp_path_factory.mktemp("fasta") / "p.fasta"
    write_fasta(path, [(f"p{i}", text) for i, text in enumerate(random_proteins(LENGTHS))])
    read = read_proteins(path, max_residues=1022)
    assert [len(protein) for protein in read] == LENGTHS
    assert [len(protein) for protein in read_proteins(path, max_residues=40, most=3)] == [5, 40, 40]
    return read


def test_lengths_fill_a_micro_batch_and_are_spread() -> None:
    lengths = uniref_lengths(1_000_000, seed=3)
    assert sum(lengths) == 1_000_000
    assert 14 <= min(lengths) < 60 and 950 < max(lengths) <= 1024
    # The mean of the 8,000 sequences, and their two special tokens.
    assert np.mean(lengths) == pytest.approx(317, rel=0.03)


def test_batches_are_those_of_extract() -> None:
    """fair-esm's own code, which ours does not call since it wants sequences as text."""
    esm = pytest.importorskip("esm")
    dataset = esm.FastaBatchedDataset(list(map(str, range(12))), ["A" * n for n in LENGTHS])
    theirs = dataset.get_batch_indices(PADDED_TOKENS, extra_toks_per_seq=1)
    assert extract_batches(LENGTHS) == theirs
    assert len(theirs) > 1


def test_a_sample_is_some_of_these_batches(proteins: list[Protein]) -> None:
    whole, some = draw_batches(proteins, 0, seed=1), draw_batches(proteins, 1, seed=1)
    texts = [[protein.tobytes() for protein in batch] for batch in whole]
    assert sum(map(len, whole)) == 12 and len(some) == 1 < len(whole)
    assert all([protein.tobytes() for protein in batch] in texts for batch in some)


def test_drawn_proteins_have_all_lengths(proteins: list[Protein]) -> None:
    short, middle, long = (len(protein) for protein in draw(proteins, 3, seed=2))
    assert short <= 31 < middle <= 299 < long
    with pytest.raises(UserError, match="13 proteins are to be drawn, and there are only 12"):
        draw(proteins, 13, seed=2)


def test_random_residues_are_a_function_of_the_seed() -> None:
    first, same, other = (random_residues([30, 9], seed) for seed in (1, 1, 2))
    assert [len(protein) for protein in first] == [28, 7]
    assert np.array_equal(first[0], same[0]) and not np.array_equal(first[0], other[0])
