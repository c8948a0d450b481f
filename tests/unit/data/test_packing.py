"""Packing: no sample lost, doubled or cut, tight packs, and a plan that is a pure function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2mega.data.packing import PackCursor, PackPlan, PackShape, plan_window
from esm2mega.data.store import TokenStore
from esm2mega.errors import UserError

LENGTHS = np.random.default_rng(0).lognormal(5.6, 0.7, size=500).astype(np.int32) + 1
SHAPE = PackShape(micro_batch_tokens=2048, max_seq_length=512, window=200)


def first_packs(plan: PackPlan, count: int) -> list[list[int]]:
    return [pack.samples.tolist() for pack in plan.take(PackCursor(), count)[0]]


def test_best_fit_by_hand() -> None:
    # 9 and 7 open packs and 3 fills the second one. Both 2 share a third pack, and 1 fits best behind the 9.
    packs = plan_window([2, 9, 3, 7, 1, 2], capacity=10)
    assert [pack.tolist() for pack in packs] == [[1, 4], [2, 3], [0, 5]]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5000))
def test_every_sample_is_in_one_pack_within_the_budget(data: st.DataObject, capacity: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=120)), dtype=np.int64)
    packs = plan_window(lengths, capacity)
    places = np.concatenate([np.zeros(0, dtype=np.int64), *packs])
    np.testing.assert_array_equal(np.sort(places), np.arange(len(lengths)))
    sums = [int(lengths[pack].sum()) for pack in packs]
    assert all(0 < total <= capacity for total in sums)
    assert all((np.diff(pack) > 0).all() for pack in packs)
    # First fit or best fit never leaves two packs that would fit into one.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > capacity
    assert [pack.tolist() for pack in plan_window(lengths.tolist(), capacity)] == [
        pack.tolist() for pack in packs
    ]


@pytest.mark.parametrize("lengths", [[11], [5, 0], [-1]])
def test_samples_that_cannot_be_packed(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit packs of 10"):
        plan_window(lengths, 10)


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_fill_on_real_lengths(real_store: TokenStore, tokens: int) -> None:
    plan = PackPlan(real_store.lengths, seed=1, shape=PackShape(tokens, max_seq_length=1024, window=16384))
    packs = plan.window_packs(0)
    fill = sum(pack.num_tokens for pack in packs) / (len(packs) * tokens)
    assert fill >= 0.995
    if tokens == 4096:
        assert fill >= 0.9990  # measured: 0.9996


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(1, 60))
def test_windows_hold_their_samples_once_and_epochs_all_proteins(
    seed: int, window: int, proteins: int
) -> None:
    lengths = LENGTHS[:proteins]
    plan = PackPlan(lengths, seed, PackShape(1024, 512, window))
    for number in range(3):
        packs = plan.window_packs(number)
        samples = np.concatenate([pack.samples for pack in packs])
        np.testing.assert_array_equal(np.sort(samples), np.arange(number * window, (number + 1) * window))
        for pack in packs:
            np.testing.assert_array_equal(pack.lengths, np.minimum(lengths[pack.sequences] + 2, 512))
            assert pack.num_tokens == pack.lengths.sum() <= 1024
    one_epoch = PackPlan(lengths, seed, PackShape(1024, 512, window), num_samples=proteins)
    sequences = np.concatenate([pack.sequences for pack in one_epoch])
    np.testing.assert_array_equal(np.sort(sequences), np.arange(proteins))


def test_plan_is_pinned_and_depends_on_the_seed_only() -> None:
    lengths = np.array([5, 9, 1, 7, 3, 3, 8, 2], dtype=np.int32)
    shape = PackShape(12, 10, 8)
    assert first_packs(PackPlan(lengths, 1234, shape), 7) == [[1, 2, 7], [4], [0, 6], [3], [5], [10], [13]]
    assert first_packs(PackPlan(lengths, 1234, shape), 7) == first_packs(
        PackPlan(lengths.copy(), 1234, shape), 7
    )
    assert first_packs(PackPlan(lengths, 1235, shape), 7) != first_packs(PackPlan(lengths, 1234, shape), 7)


def test_long_proteins_are_spread_over_the_window() -> None:
    plan = PackPlan(LENGTHS, 1, PackShape(2048, 512, 5000))
    packs = plan.window_packs(0)
    longest = np.array([pack.lengths.mean() for pack in packs])
    half = len(packs) // 2
    assert abs(longest[:half].mean() - longest[half:].mean()) < 0.1 * longest.mean()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_taking_in_any_portions_gives_the_same_packs(portions: list[int]) -> None:
    expected, end = PackPlan(LENGTHS, 3, SHAPE).take(PackCursor(), sum(portions))
    cursor, taken = PackCursor(), []
    for portion in portions:
        packs, cursor = PackPlan(LENGTHS, 3, SHAPE).take(PackCursor.from_dict(cursor.to_dict()), portion)
        taken += packs
    assert [pack.samples.tolist() for pack in taken] == [pack.samples.tolist() for pack in expected]
    assert cursor == end


def test_a_finite_plan_ends() -> None:
    plan = PackPlan(LENGTHS, 3, SHAPE, num_samples=500)
    everything = list(plan)
    taken, cursor = plan.take(PackCursor(), 10_000)
    assert [pack.samples.tolist() for pack in taken] == [pack.samples.tolist() for pack in everything]
    assert cursor == PackCursor(3, 0) and plan.take(cursor, 1) == ([], cursor)


def test_a_cursor_outside_its_window_is_refused() -> None:
    with pytest.raises(IndexError, match="pack 100000 of window 0"):
        PackPlan(LENGTHS, 3, SHAPE).take(PackCursor(0, 100_000), 1)


def test_shape_errors_name_the_keys() -> None:
    with pytest.raises(
        UserError, match=r"train.micro_batch_tokens=512 is smaller than data.max_seq_length=1024"
    ):
        PackShape(512, 1024, 100)
    with pytest.raises(UserError, match=r"data.pack_window=0"):
        PackShape(1024, 1024, 0)
