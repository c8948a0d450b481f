"""Masking: pinned choices, 80/10/10, residues only, and nothing that depends on the neighbours in a pack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig
from esm2mega.data.stream.masking import MaskedTokens, mask_tokens
from tests.unit.data.chi_square import assert_matches, assert_uniform

CONFIG = DataConfig()


def protein(residues: str) -> np.ndarray:
    return np.array([vocabulary.CLS, *vocabulary.encode_residues(residues), vocabulary.EOS], dtype=np.uint8)


def mask(tokens: np.ndarray, lengths: list[int], config: DataConfig = CONFIG, seed: int = 1) -> MaskedTokens:
    return mask_tokens(tokens, np.arange(len(lengths)), np.array(lengths), seed, config)


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, MaskedTokens]:
    """2,000 proteins of 300 residues L, masked."""
    tokens = np.tile(protein("L" * 300), 2000)
    return tokens, mask(tokens, [302] * 2000)


def test_choices_are_pinned() -> None:
    tokens = np.concatenate([protein("MKTLAGVSERTIDPKQNFYMHWCXBUZO.-"), protein("ACDJJACD")])
    masked = mask_tokens(tokens, np.array([7, 123_456_789_012]), np.array([32, 10]), 1234, CONFIG)
    assert masked.label_positions.tolist() == [12, 14, 17, 23]
    assert masked.labels.tolist() == [12, 14, 17, 23]
    assert masked.input_ids[masked.label_positions].tolist() == [32, 32, 32, 32]


def test_unchosen_tokens_stay_and_labels_are_the_originals(many: tuple[np.ndarray, MaskedTokens]) -> None:
    tokens, masked = many
    assert masked.input_ids.dtype == masked.labels.dtype == masked.label_positions.dtype == np.int64
    assert (np.diff(masked.label_positions) > 0).all()
    np.testing.assert_array_equal(masked.labels, tokens[masked.label_positions])
    unchosen = np.ones(len(tokens), dtype=bool)
    unchosen[masked.label_positions] = False
    np.testing.assert_array_equal(masked.input_ids[unchosen], tokens[unchosen])


def test_ratios(many: tuple[np.ndarray, MaskedTokens]) -> None:
    tokens, masked = many
    residues, chosen = 2000 * 300, len(masked.labels)
    assert_matches([chosen, residues - chosen], [0.15, 0.85])
    now = masked.input_ids[masked.label_positions]
    to_mask, same = int((now == vocabulary.MASK).sum()), int((now == masked.labels).sum())
    # A random residue is the old one in 1 of 20 cases.
    assert_matches([to_mask, same, chosen - to_mask - same], [0.8, 0.105, 0.095])


def test_random_residues_are_uniform_over_the_twenty(many: tuple[np.ndarray, MaskedTokens]) -> None:
    _, masked = many
    now = masked.input_ids[masked.label_positions]
    others = now[(now != vocabulary.MASK) & (now != masked.labels)]
    counts = np.bincount(others, minlength=33)
    assert counts[:4].sum() == counts[24:].sum() == 0
    assert_uniform(counts[5:24])  # 4 is L itself, which cannot be told from an unchanged token


def test_each_place_of_a_protein_is_chosen_equally_often(many: tuple[np.ndarray, MaskedTokens]) -> None:
    _, masked = many
    assert_uniform(np.bincount(masked.label_positions % 302, minlength=302)[1:301])
    assert_uniform(np.bincount(masked.label_positions // 302, minlength=2000))


def test_special_and_unknown_tokens_are_never_chosen() -> None:
    tokens = np.tile(np.arange(33, dtype=np.uint8), 300)
    masked = mask(tokens, [33] * 300, replace(CONFIG, mlm_probability=0.999999))
    chosen = set(masked.labels.tolist())
    assert chosen == set(range(33)) - {0, 1, 2, 3, 31, 32}
    assert len(masked.labels) == 300 * 27


def test_fractions_at_their_limits() -> None:
    tokens = np.tile(protein("LAGV" * 25), 20)
    lengths = [102] * 20
    only_mask = mask(tokens, lengths, replace(CONFIG, mask_fraction=1.0, random_fraction=0.0))
    assert (only_mask.input_ids[only_mask.label_positions] == vocabulary.MASK).all()
    only_keep = mask(tokens, lengths, replace(CONFIG, mask_fraction=0.0, random_fraction=0.0))
    np.testing.assert_array_equal(only_keep.input_ids, tokens)
    np.testing.assert_array_equal(only_keep.label_positions, only_mask.label_positions)
    only_random = mask(tokens, lengths, replace(CONFIG, mask_fraction=0.0, random_fraction=1.0))
    replaced = only_random.input_ids[only_random.label_positions]
    assert set(replaced.tolist()) == set(range(4, 24))


def test_random_residues_of_the_whole_vocabulary_when_asked_for() -> None:
    tokens = np.tile(protein("L" * 300), 300)
    config = replace(CONFIG, mask_fraction=0.0, random_fraction=1.0, random_residues="all")
    masked = mask(tokens, [302] * 300, config)
    assert_uniform(np.bincount(masked.input_ids[masked.label_positions], minlength=33))


def test_a_sample_is_masked_alike_in_any_company() -> None:
    proteins = [protein("LAGV" * length) for length in (3, 50, 7, 20)]
    numbers = np.array([5, 900, 31, 4])
    lengths = np.array([len(tokens) for tokens in proteins])
    together = mask_tokens(np.concatenate(proteins), numbers, lengths, 1, CONFIG)
    alone = [
        mask_tokens(tokens, numbers[i : i + 1], lengths[i : i + 1], 1, CONFIG)
        for i, tokens in enumerate(proteins)
    ]
    np.testing.assert_array_equal(together.input_ids, np.concatenate([masked.input_ids for masked in alone]))
    np.testing.assert_array_equal(together.labels, np.concatenate([masked.labels for masked in alone]))


def test_samples_seeds_and_epochs_are_masked_differently() -> None:
    tokens = protein("LAGV" * 100)
    length = np.array([len(tokens)])
    choices = {
        tuple(mask_tokens(tokens, np.array([sample]), length, seed, CONFIG).label_positions.tolist())
        for sample in (0, 1, 8000)
        for seed in (1, 2)
    }
    assert len(choices) == 6


def test_no_tokens_at_all() -> None:
    empty = np.zeros(0, dtype=np.int64)
    masked = mask_tokens(empty.astype(np.uint8), empty, empty, 1, CONFIG)
    assert [len(part) for part in masked] == [0, 0, 0]
