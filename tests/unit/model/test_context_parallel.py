"""The plan of an exchange: every rank gets what its tokens attend to, and ranks agree on who gives what."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from esm2mega.model.context_parallel import HeadExchange, KeyExchange, in_parts
from esm2mega.model.packed import PackedSequences


def lengths_of_a_pack(rng: np.random.Generator, total: int) -> list[int]:
    """Lengths from 1 to all of it, that add up to `total`."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, round(total ** rng.random())))
    return lengths


def parts(
    monkeypatch: pytest.MonkeyPatch, packed: PackedSequences, size: int, exchange: str
) -> list[PackedSequences]:
    config = SimpleNamespace(context_parallel_size=size, context_exchange=exchange)
    found = []
    for rank in range(size):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        found.append(in_parts(packed, config))
    return found


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("mode", ["needed", "gather"])
def test_keys_of_every_query_arrive(monkeypatch: pytest.MonkeyPatch, size: int, mode: str) -> None:
    rng = np.random.default_rng(size)
    for _ in range(30):
        part = int(rng.integers(1, 40))
        lengths = lengths_of_a_pack(rng, part * size)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        tokens = np.arange(part * size)
        packed = PackedSequences.from_lengths(lengths).with_dropout_keys(torch.arange(len(lengths)))
        exchanges = [found.exchange for found in parts(monkeypatch, packed, size, mode)]
        for rank, exchange in enumerate(exchanges):
            assert isinstance(exchange, KeyExchange)
            fetched = [tokens[part * other :][exchanges[other].given[rank]] for other in range(size)]
            assert [len(x) for x in fetched] == list(exchange.taken)
            keys = np.concatenate(fetched)
            own = tokens[rank * part : (rank + 1) * part]
            # Sequence by sequence, the queries are this rank's tokens, and the keys are all of the protein.
            local = exchange.packed
            assert sum(local.query_lens) == part and sum(local.seqlens) == len(keys)
            assert local.cu_seqlens_q.tolist() == [0, *accumulate(local.query_lens)]
            assert local.cu_seqlens_kv.tolist() == [0, *accumulate(local.seqlens)]
            at_query = at_key = 0
            for queries, length in zip(local.query_lens, local.seqlens, strict=True):
                protein = keys[at_key : at_key + length]
                assert (tokens[owner == owner[protein[0]]] == protein).all()
                assert (owner[own[at_query : at_query + queries]] == owner[protein[0]]).all()
                assert mode == "gather" or queries
                at_query, at_key = at_query + queries, at_key + length
            assert torch.equal(local.query_keys, packed.query_keys[rank * part : (rank + 1) * part])


@pytest.mark.parametrize("mode", ["heads", "needed", "gather"])
def test_rows_with_logits_are_divided_by_where_they_are(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    lengths, rows = [5, 30, 1, 4], np.array([0, 3, 7, 8, 19, 25, 39])
    owner = np.repeat(np.arange(4), lengths)
    counts = np.bincount(owner[rows], minlength=4).tolist()
    packed = PackedSequences.from_lengths(lengths, row_counts=counts, host_rows=rows)
    packed = packed.with_rows(torch.from_numpy(rows))
    expected = [[0, 3, 7, 8], [9], [5], [9]]
    for rank, found in enumerate(parts(monkeypatch, packed, 4, mode)):
        assert found.rows.tolist() == expected[rank]
        own = found.exchange.own_rows
        assert (own.counts, own.first) == ((4, 1, 1, 1), sum(map(len, expected[:rank])))
        last = found.at_rows().exchange
        if isinstance(last, HeadExchange):
            # Of its heads a rank has all queries.
            assert (last.packed.query_lens, last.query_counts) == (tuple(counts), own.counts)
        else:
            held = np.array(expected[rank], dtype=int) + rank * 10
            queries = [n for n in np.bincount(owner[held], minlength=4).tolist() if n]
            assert [n for n in last.packed.query_lens if n] == queries
            assert sum(last.packed.query_lens) == len(found.rows)


@pytest.mark.parametrize("mode", ["heads", "needed", "gather"])
def test_a_layer_stays_whole_if_a_rank_had_no_rows(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    lengths, rows = [5, 30, 1, 4], np.array([0, 3, 19, 39])
    packed = PackedSequences.from_lengths(lengths, row_counts=[2, 1, 0, 1], host_rows=rows)
    for found in parts(monkeypatch, packed.with_rows(torch.from_numpy(rows)), 4, mode):
        assert (found.rows, found.exchange.own_rows, found.exchange.packed.rows) == (None, None, None)
