"""Packs and padded batches: borders, positions, and the way there and back."""

from __future__ import annotations

import pytest
import torch

from esm2mega.model.packed import PackedSequences
from tests.padded import pack, unpack

# Rows of length 2, 4 and 3, padded at the right, not at all, and at the left.
IDS = torch.tensor([[0, 2, 1, 1], [0, 7, 8, 2], [1, 0, 9, 2]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])


def test_from_lengths() -> None:
    packed = PackedSequences.from_lengths([2, 4, 3])
    assert packed.cu_seqlens_q.tolist() == [0, 2, 6, 9]
    assert packed.cu_seqlens_kv.tolist() == [0, 2, 6, 9]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (4, 4)
    assert packed.seqlens == (2, 4, 3)
    assert packed.num_tokens == 9
    assert packed.qkv_format == "thd"


def test_borders_of_rows_are_those_of_the_queries_alone() -> None:
    rows = torch.tensor([0, 3, 4, 5])
    packed = PackedSequences.from_lengths([2, 1, 4], row_counts=[1, 0, 3]).with_rows(rows)
    assert packed.rows is rows
    assert packed.cu_seqlens_q.tolist() == [0, 2, 3, 7], "the other layers see the whole pack"
    last = packed.at_rows()
    assert last.cu_seqlens_q.tolist() == [0, 1, 1, 4]
    assert last.cu_seqlens_q.dtype == torch.int32
    assert last.cu_seqlens_kv.tolist() == [0, 2, 3, 7]
    assert (last.max_seqlen_q, last.max_seqlen_kv) == (3, 4)
    assert (last.query_lens, last.seqlens) == ((1, 0, 3), (2, 1, 4))


def test_a_pack_stays_whole_without_counts_or_rows() -> None:
    assert PackedSequences.from_lengths([2, 1]).with_rows(torch.tensor([1])).rows is None
    none = torch.empty(0, dtype=torch.int64)
    assert PackedSequences.from_lengths([2, 1], row_counts=[0, 0]).with_rows(none).rows is None


def test_sequence_ids_and_positions() -> None:
    packed = PackedSequences.from_lengths([2, 1, 3])
    assert packed.sequence_ids().tolist() == [0, 0, 1, 2, 2, 2]
    assert packed.positions().tolist() == [0, 1, 0, 0, 1, 2]


def test_pack_drops_padding_of_either_side() -> None:
    ids, packed = pack(IDS, MASK)
    assert ids.tolist() == [0, 2, 0, 7, 8, 2, 0, 9, 2]
    assert packed.seqlens == (2, 4, 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_round_trip(dtype: torch.dtype) -> None:
    mask = MASK.to(dtype)
    ids, _ = pack(IDS, mask)
    assert torch.equal(unpack(ids, mask, fill=1), IDS)


def test_unpack_keeps_trailing_dimensions_and_gradients() -> None:
    values = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    padded = unpack(values, MASK, fill=-3.0)
    assert padded.shape == (3, 4, 5)
    assert torch.equal(padded[MASK.bool()], values)
    assert (padded[~MASK.bool()] == -3.0).all()
    padded.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_empty_row_is_named() -> None:
    with pytest.raises(ValueError, match="row 1 .* no token"):
        pack(IDS, torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]))


def test_gap_is_named() -> None:
    with pytest.raises(ValueError, match="row 2 .* gap"):
        pack(IDS, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1]]))
