"""All contenders are given the same work: the same tokens and labels, padded or packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esm2mega.benchmark.batches import (
    by_number,
    by_padded_tokens,
    by_tokens,
    pack,
    pad,
    padded_tokens,
    random_order,
    random_proteins,
    real_tokens,
    sorted_order,
)
from esm2mega.data.stream.masking import MaskedTokens

LENGTHS = [52, 14, 30, 52, 41, 7, 23, 19, 38, 9, 11, 50]


@pytest.fixture(scope="module")
def proteins() -> list[MaskedTokens]:
    return random_proteins(LENGTHS, seed=1)


def test_packed_and_padded_batches_hold_the_same_tokens_and_labels(proteins: list[MaskedTokens]) -> None:
    shuffled = random_order(proteins, by_number(4), np.random.default_rng(0))
    by_length = sorted_order(proteins, by_number(4), np.random.default_rng(0))
    assert [len(batch) for batch in shuffled] == [4, 4, 4]
    everything = [
        sorted(p.input_ids.tobytes() for p in sum(batches, [])) for batches in (shuffled, by_length)
    ]
    assert everything[0] == everything[1] == sorted(p.input_ids.tobytes() for p in proteins)
    assert real_tokens(shuffled) == sum(LENGTHS)
    assert sum(LENGTHS) < padded_tokens(by_length) < padded_tokens(shuffled)
    chosen = next(batch for batch in shuffled if max(len(p.input_ids) for p in batch) == 52)
    input_ids, attention_mask, labels = pad(chosen)
    packed = pack(chosen)
    keep = attention_mask.bool()
    assert torch.equal(input_ids[keep], packed.input_ids)
    assert torch.equal(labels[keep][packed.label_positions], packed.labels)
    assert int((labels != -100).sum()) == len(packed.labels) > 0
    assert packed.seqlens == attention_mask.sum(1).tolist() == np.diff(packed.cu_seqlens).tolist()


def test_a_batch_holds_what_fits_into_its_tokens(proteins: list[MaskedTokens]) -> None:
    batches = by_tokens(120)(proteins)
    assert [p for batch in batches for p in batch] == proteins
    totals = [sum(len(p.input_ids) for p in batch) for batch in batches]
    assert max(totals) <= 120
    firsts = [len(batch[0].input_ids) for batch in batches[1:]]
    assert all(total + first > 120 for total, first in zip(totals, firsts, strict=False))


def test_padded_batches_stay_within_their_tokens() -> None:
    divided = by_padded_tokens(40)(random_proteins([5, 9, 9, 10, 30, 31, 200], seed=1))
    assert [[len(p.input_ids) for p in batch] for batch in divided] == [[5, 9, 9, 10], [30], [31], [200]]
