"""Attention costs the ranks of a step about as much, whichever packs the step has."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2mega.config.schema import DataConfig
from esm2mega.data.stream.balance import share_out
from esm2mega.data.stream.build import BatchSpec, Dealt, Share, StreamState, deal
from esm2mega.data.stream.packing import PackWindow
from esm2mega.data.stream.samples import Pieces, TrainSamples
from tests.unit.data.lengths import Lengths

TOKENS = 16_384

# Proteins as in UniRef90, and one in fifty as long as a pack or half as long.
RANDOM = np.random.default_rng(4)
LENGTHS = np.minimum(RANDOM.lognormal(5.6, 0.7, size=4000).astype(np.int64) + 1, TOKENS - 2)
LENGTHS[::100] = TOKENS - 2
LENGTHS[50::100] = TOKENS // 2
SAMPLES = TrainSamples([Lengths(LENGTHS)], DataConfig(max_seq_length=TOKENS), 1)  # type: ignore[list-item]
SPEC = BatchSpec(DataConfig(max_seq_length=TOKENS, pack_window=4000), TOKENS, seed=1)


def test_by_hand() -> None:
    # 9 to rank 0, 7 and 6 to rank 1, both 1 to rank 0, which is then full, and 0 to rank 1.
    assert share_out([1, 9, 7, 1, 6, 0], 2) == [[0, 1, 3], [2, 4, 5]]
    assert share_out([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert share_out([3, 1, 2], 1) == [[0, 1, 2]]
    assert share_out([8, 1, 1], 2) == [[0], [1, 2]]
    assert share_out([1, 8], 3) == [[0], [1], []]
    assert share_out([], 3) == [[], [], []]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 9))
def test_every_pack_has_one_rank_and_no_rank_too_many(costs: list[int], ranks: int) -> None:
    shares = share_out(costs, ranks)
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(len(costs)))
    assert len(shares) == ranks and all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) == -(-len(costs) // ranks)


def rounds(dp_size: int, micro_batches: int, count: int, spec: BatchSpec = SPEC) -> list[list[Dealt]]:
    """What each rank is dealt in its first `count` rounds."""
    shares = [Share(rank, dp_size, micro_batches=micro_batches) for rank in range(dp_size)]
    return [list(itertools.islice(deal(SAMPLES, spec, share, StreamState()), count)) for share in shares]


@pytest.mark.parametrize(("dp_size", "micro_batches"), [(2, 8), (4, 8), (8, 4)])
def test_ranks_wait_little_where_proteins_differ_widely(dp_size: int, micro_batches: int) -> None:
    found = rounds(dp_size, micro_batches, 5 * micro_batches)
    for first in range(0, 5 * micro_batches, micro_batches):
        step = [[dealt.pack.cost for dealt in rank[first : first + micro_batches]] for rank in found]
        loads = [sum(costs) for costs in step]
        # No division is better than the mean, than the costliest pack with the cheapest others, or than two
        # of the costliest, where these are one more than there are ranks.
        every = sorted(itertools.chain.from_iterable(step))
        alone = every[-1] + sum(every[: micro_batches - 1])
        two = every[-dp_size] + every[-dp_size - 1] + sum(every[: micro_batches - 2])
        best = max(sum(loads) / dp_size, alone, two)
        # Graham's bound of this rule, which he proved for ranks that take any number of packs.
        assert max(loads) <= 4 / 3 * best
        numbers = sorted(dealt.number for rank in found for dealt in rank[first : first + micro_batches])
        assert numbers == list(range(first * dp_size, (first + micro_batches) * dp_size))
    assert all(rank[-1].behind == found[0][-1].behind for rank in found)


def test_the_packs_of_one_rank_keep_their_order() -> None:
    assert [dealt.number for dealt in rounds(1, 8, 24)[0]] == list(range(24))


def test_a_skipped_pack_leaves_the_others_where_they_are() -> None:
    whole, without = rounds(2, 4, 8), rounds(2, 4, 8, replace(SPEC, skipped=frozenset([3, 8])))
    for rank, other in zip(whole, without, strict=True):
        for a, b in zip(rank, other, strict=True):
            assert (a.number, a.behind) == (b.number, b.behind)
            assert b.pack.num_pieces == (0 if b.number in (3, 8) else a.pack.num_pieces)


def test_steps_that_take_samples_are_divided_too() -> None:
    """A window is a step; its packs do not divide evenly, and some rank gets padding in the last round."""
    spec = replace(SPEC, global_batch_size=200)
    found = rounds(4, 1, 60, spec)
    step: list[int] = []
    for number, turn in enumerate(zip(*found, strict=True)):
        assert len({dealt.behind.cursor for dealt in turn}) == 1
        step += [dealt.number for dealt in turn if dealt.number >= 0]
        if not turn[0].behind.cursor.offset:
            assert sorted(step) == list(range(turn[0].behind.consumed_packs))[-len(step) :]
            assert len(step) <= 4 * (number + 1)
            step = []


def test_costs_count_padding_as_the_sequence_that_it_is() -> None:
    """The gaps of a padded batch and the rest of a pack attend to themselves."""
    lengths = np.array([3, 2, 1, 4])
    nothing = np.zeros(4, dtype=np.int64)
    pieces = Pieces(np.arange(4), nothing, nothing, nothing, lengths)
    pack_of = np.array([0, 0, 1, 0])
    packed = PackWindow.of(pieces, pack_of, 10, padded=False)
    assert packed.costs == [3**2 + 2**2 + 4**2 + 1, 1 + 9**2]
    padded = PackWindow.of(pieces, pack_of, 16, padded=True)
    assert padded.costs == [3**2 + 1 + 2**2 + 2**2 + 4**2 + 4**2, 1 + 15**2]
