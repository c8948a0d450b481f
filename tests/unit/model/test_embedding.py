"""Token dropout: literal factors, per sequence."""

from __future__ import annotations

import pytest
import torch

from esm2mega.model.embedding import token_dropout_scale
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from esm2mega.vocabulary import CLS, EOS, MASK, PAD

A, L = 5, 4


def _scale(*sequences: list[int]) -> list[float]:
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    scale = token_dropout_scale(ids, PackedSequences.from_lengths([len(s) for s in sequences]))
    assert scale.dtype == torch.float64
    return scale.tolist()


def test_without_masks_every_row_is_scaled() -> None:
    """Also at inference: 1 - 0.15 * 0.8 = 0.88."""
    assert _scale([CLS, A, L, EOS]) == pytest.approx([0.88] * 4, rel=1e-15)


def test_masked_rows_are_zero_and_the_rest_makes_up_for_them() -> None:
    """One of four masked: 0.88 / 0.75 = 1.17333."""
    expected = 1.1733333333333333
    assert _scale([CLS, MASK, L, EOS]) == pytest.approx([expected, 0.0, expected, expected], rel=1e-15)


def test_each_sequence_has_its_own_share() -> None:
    scale = _scale([CLS, MASK, EOS], [CLS, A, EOS], [CLS, MASK, MASK, A, EOS])
    expected = [1.32, 0, 1.32, 0.88, 0.88, 0.88, 22 / 15, 0, 0, 22 / 15, 22 / 15]
    assert scale == pytest.approx(expected, rel=1e-15)


def test_nothing_but_masks_is_zero_not_nan() -> None:
    assert _scale([MASK, MASK], [CLS, A]) == pytest.approx([0.0, 0.0, 0.88, 0.88], rel=1e-15)


def test_embedding_is_the_scaled_table(model: ESM2Model) -> None:
    ids = torch.tensor([CLS, MASK, L, EOS, MASK, MASK, PAD, PAD])
    packed = PackedSequences.from_lengths([4, 2, 2])
    out = model.embedding(ids, packed)
    table = model.embedding.word_embeddings.weight
    expected = (
        table[ids] * torch.tensor([0.88 / 0.75, 0, 0.88 / 0.75, 0.88 / 0.75, 0, 0, 0.88, 0.88])[:, None]
    )
    assert out.shape == (8, 1, 24)
    assert torch.allclose(out[:, 0], expected, rtol=1e-6, atol=0)
    assert torch.isfinite(out).all()


def test_only_unmasked_tokens_teach_the_table(model: ESM2Model) -> None:
    model.embedding(
        torch.tensor([CLS, MASK, L, EOS, MASK]), PackedSequences.from_lengths([4, 1])
    ).sum().backward()
    gradient = model.embedding.word_embeddings.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == [CLS, EOS, L]
    assert torch.isfinite(gradient).all()
