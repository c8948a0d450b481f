"""Packing: no sample lost, doubled or cut, tight packs, and a plan that is a pure function."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2mega.config.schema import DataConfig
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.packing import (
    Pack,
    PackCursor,
    PackPlan,
    PackShape,
    plan_buckets,
    plan_packs,
)
from esm2mega.data.stream.samples import TrainSamples
from esm2mega.errors import UserError
from tests.unit.data.lengths import Lengths

LENGTHS = np.random.default_rng(0).lognormal(5.6, 0.7, size=500).astype(np.int32) + 1
SHAPE = PackShape(micro_batch_tokens=2048, max_seq_length=512, pack_window=200)


def plan_of(
    lengths: npt.ArrayLike, seed: int, shape: PackShape, num_samples: int | None = None, crop: str = "start"
) -> PackPlan:
    """The packs of a store with these lengths."""
    config = DataConfig(max_seq_length=shape.max_seq_length, crop=crop)
    samples = TrainSamples([Lengths(lengths)], config, seed)  # type: ignore[list-item]
    return PackPlan(samples, seed, shape, num_samples)


def samples_of(pack: Pack) -> list[int]:
    samples: list[int] = pack.pieces.samples.tolist()
    return samples


def first_packs(plan: PackPlan, count: int) -> list[list[int]]:
    return list(map(samples_of, plan.take(PackCursor(), count)[0]))


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook algorithm, piece by piece; returns the tokens of each pack."""
    packs: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(used, i) for i, used in enumerate(packs) if used + length <= capacity]
        if fitting:
            packs[max(fitting)[1]] += length
        else:
            packs.append(length)
    return sorted(packs)


def test_best_fit_by_hand() -> None:
    # 9 and 7 open packs and 3 fills the second one. Both 2 share a third pack, and 1 fits best behind the 9.
    assert plan_packs([2, 9, 3, 7, 1, 2], capacity=10).tolist() == [2, 0, 1, 1, 0, 2]


def test_buckets_by_hand() -> None:
    # Two of up to 5 fit into 10; with 4 at most still two; 2, 2, 1 are three of at most 3.
    assert plan_buckets([2, 5, 4, 1, 4, 2, 5], capacity=10).tolist() == [2, 0, 1, 2, 1, 2, 0]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5000))
def test_every_piece_is_in_one_pack_within_the_budget(data: st.DataObject, capacity: int) -> None:
    few = st.sampled_from(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=5)))
    drawn = data.draw(st.lists(few | st.integers(1, capacity), max_size=120))
    lengths = np.array(drawn, dtype=np.int64)
    pack_of = plan_packs(lengths, capacity)
    assert len(pack_of) == len(lengths)
    tokens = np.bincount(pack_of, weights=lengths)
    assert (tokens <= capacity).all() and (tokens > 0).all()
    assert sorted(tokens.astype(int).tolist()) == best_fit_decreasing(drawn, capacity)
    assert plan_packs(drawn, capacity).tolist() == pack_of.tolist()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5000))
def test_every_piece_is_in_one_bucket_of_similar_ones(data: st.DataObject, capacity: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=120)), dtype=np.int64)
    pack_of = plan_buckets(lengths, capacity)
    buckets = [lengths[pack_of == number] for number in range(pack_of.max(initial=-1) + 1)]
    assert all(0 < len(bucket) * bucket.max() <= capacity for bucket in buckets)
    for longer, shorter in itertools.pairwise(buckets):
        assert longer.min() >= shorter.max()
        assert (len(longer) + 1) * longer.max() > capacity  # one more would not have fit


@pytest.mark.parametrize("lengths", [[11], [5, 0], [-1]])
def test_samples_that_cannot_be_packed(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit packs of 10"):
        plan_packs(lengths, 10)
    with pytest.raises(ValueError, match="do not fit packs of 10"):
        plan_buckets(lengths, 10)


@pytest.mark.parametrize(("tokens", "least"), [(1024, 0.995), (4096, 0.999), (16384, 0.998), (65536, 0.998)])
def test_fill_on_real_lengths(real_store: TokenStore, tokens: int, least: float) -> None:
    """The proteins of 8,000 alone, and the same lengths drawn to a store of 200,000."""
    many = real_store.lengths[np.random.default_rng(2).integers(0, 8000, size=200_000)]
    for lengths in (real_store.lengths, many):
        window = plan_of(lengths, 1, PackShape(tokens, 1024)).window(0)
        assert len(window.pieces) == 8 * tokens
        assert sum(window.num_tokens) / (len(window) * tokens) >= least


def test_fill_of_buckets_is_that_of_padded_batches(real_store: TokenStore) -> None:
    window = plan_of(real_store.lengths, 1, PackShape(4096, 1024, packing="bucket")).window(0)
    fill = sum(window.num_tokens) / (len(window) * 4096)
    assert 0.8 < fill < 0.97  # measured: 0.954; what does not fit another row is padding too


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(1, 60), st.sampled_from(["pack", "bucket"]))
def test_windows_hold_their_samples_once_and_epochs_all_proteins(
    seed: int, window: int, proteins: int, packing: str
) -> None:
    lengths, shape = LENGTHS[:proteins], PackShape(1024, 512, window, packing)
    plan = plan_of(lengths, seed, shape)
    for number in range(3):
        pieces = plan.window(number).pieces
        expected = np.arange(number * window, (number + 1) * window)
        np.testing.assert_array_equal(np.sort(pieces.samples), expected)
        np.testing.assert_array_equal(pieces.lengths, np.minimum(lengths[pieces.rows] + 2, 512))
    one_epoch = plan_of(lengths, seed, shape, num_samples=proteins)
    rows = np.concatenate([part.pieces.rows for part in one_epoch.windows()])
    np.testing.assert_array_equal(np.sort(rows), np.arange(proteins))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.sampled_from(["pack", "bucket"]), st.sampled_from(["start", "chunk"]))
def test_pieces_lie_in_their_packs_without_overlap(window: int, packing: str, crop: str) -> None:
    plan = plan_of(LENGTHS, 3, PackShape(700, 256, window, packing), crop=crop)
    packs, _ = plan.take(PackCursor(), 30)
    for pack in packs:
        ends = pack.offsets + pack.pieces.lengths
        assert pack.offsets[0] == 0 and ends[-1] <= 700
        assert pack.num_pieces == len(pack.pieces) == len(pack.offsets)
        assert pack.num_tokens == pack.pieces.lengths.sum()
        if packing == "pack":
            np.testing.assert_array_equal(pack.offsets[1:], ends[:-1])
            assert (np.diff(pack.pieces.samples) >= 0).all()
        else:
            longest = pack.pieces.lengths.max()
            np.testing.assert_array_equal(pack.offsets, np.arange(len(ends)) * longest)
            assert len(ends) * longest <= 700


def test_plan_is_pinned_and_depends_on_the_seed_only() -> None:
    lengths = np.array([5, 9, 1, 7, 3, 3, 8, 2], dtype=np.int32)
    shape = PackShape(12, 10, 8)
    pinned = [[0, 6], [4], [1, 2, 7], [5], [3], [10], [13]]
    assert first_packs(plan_of(lengths, 1234, shape), 7) == pinned
    assert first_packs(plan_of(lengths.copy(), 1234, shape), 7) == pinned
    assert first_packs(plan_of(lengths, 1235, shape), 7) != pinned


def test_digest_of_many_packs_is_pinned() -> None:
    packs, _ = plan_of(LENGTHS, 1234, SHAPE, crop="random").take(PackCursor(), 500)
    content = hashlib.sha256()
    for pack in packs:
        pieces = pack.pieces
        for part in (pieces.samples, pieces.rows, pieces.starts, pieces.lengths, pack.offsets):
            content.update(part.astype("<i8").tobytes())
    assert content.hexdigest()[:16] == "143490a9e701f9ea"


def test_long_proteins_are_spread_over_the_window() -> None:
    packs, _ = plan_of(LENGTHS, 1, PackShape(2048, 512, 5000)).take(PackCursor(), 700)
    longest = np.array([pack.pieces.lengths.mean() for pack in packs])
    half = len(packs) // 2
    assert abs(longest[:half].mean() - longest[half:].mean()) < 0.1 * longest.mean()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_taking_in_any_portions_gives_the_same_packs(portions: list[int]) -> None:
    expected, end = plan_of(LENGTHS, 3, SHAPE).take(PackCursor(), sum(portions))
    cursor, taken = PackCursor(), []
    for portion in portions:
        packs, cursor = plan_of(LENGTHS, 3, SHAPE).take(PackCursor.from_dict(cursor.to_dict()), portion)
        taken += packs
    assert list(map(samples_of, taken)) == list(map(samples_of, expected))
    assert cursor == end


def test_a_finite_plan_ends() -> None:
    plan = plan_of(LENGTHS, 3, SHAPE, num_samples=500)
    everything = [Pack(window, i) for window in plan.windows() for i in range(len(window))]
    taken, cursor = plan.take(PackCursor(), 10_000)
    assert list(map(samples_of, taken)) == list(map(samples_of, everything))
    assert cursor == PackCursor(3, 0) and plan.take(cursor, 1) == ([], cursor)


def test_a_cursor_outside_its_window_is_refused() -> None:
    with pytest.raises(IndexError, match="pack 100000 of window 0"):
        plan_of(LENGTHS, 3, SHAPE).take(PackCursor(0, 100_000), 1)


def test_shape_errors_name_the_keys() -> None:
    with pytest.raises(
        UserError, match=r"train.micro_batch_tokens=512 is smaller than data.max_seq_length=1024"
    ):
        PackShape(512, 1024, 100)
    with pytest.raises(UserError, match=r"data.pack_window=0"):
        PackShape(1024, 1024, 0)


def test_the_window_grows_with_the_pack() -> None:
    assert PackShape(4096, 1024).window == 8 * 4096
    assert PackShape(4096, 1024, 100).window == 100
