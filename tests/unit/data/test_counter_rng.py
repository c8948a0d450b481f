"""Sample order and random numbers: pinned values, permutations, uniformity and independence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2mega.data import counter_rng
from esm2mega.data.counter_rng import Purpose, SampleOrder, crop_starts
from tests.unit.data.chi_square import assert_uniform


def bits(seed: int, purpose: Purpose, streams: int, positions: int) -> np.ndarray:
    """Random bits of the first streams and positions, [streams, positions]."""
    starts = counter_rng.stream_starts(seed, purpose, np.arange(streams))
    return counter_rng.bits_at(starts[:, None], np.arange(positions))


def test_mix_is_that_of_splitmix64() -> None:
    # First outputs of the reference implementation (Vigna, splitmix64.c) for the seed 1234567.
    outputs = counter_rng.bits_at(np.array([1234567], dtype=np.uint64), np.arange(5))
    assert outputs.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_numbers_are_pinned() -> None:
    # These values decide what every run with a given seed sees: they may never change.
    assert counter_rng.derive_seed(1234, Purpose.MASK) == 11778282174819004857
    assert bits(1234, Purpose.MASK, 2, 2).tolist() == [
        [18409502734914192760, 13864369008559708674],
        [17032301180471577897, 14751229696498627014],
    ]
    assert SampleOrder(10, seed=1234)(np.arange(20))[1].tolist() == [
        5,
        3,
        1,
        7,
        9,
        4,
        0,
        2,
        8,
        6,
        2,
        1,
        9,
        8,
        4,
        0,
        3,
        6,
        5,
        7,
    ]
    assert SampleOrder(190_000_000, seed=1234)(np.array([0, 1, 190_000_000]))[1].tolist() == [
        10145975,
        124135893,
        97179689,
    ]
    starts = crop_starts(1234, np.arange(8), [1030, 5000, 1024, 10, 8003, 1025, 1025, 2048], 1024)
    assert starts.tolist() == [0, 3282, 0, 0, 6148, 0, 0, 909]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 97, 100, 1000, 4097])
def test_every_epoch_is_a_permutation_and_differs(size: int) -> None:
    epochs, indices = SampleOrder(size, seed=5)(np.arange(3 * size))
    assert epochs.tolist() == [0] * size + [1] * size + [2] * size
    orders = indices.reshape(3, size)
    assert (np.sort(orders) == np.arange(size)).all()
    if size >= 97:
        assert (orders[0] == orders[1]).mean() < 0.1 and (orders[1] == orders[2]).mean() < 0.1
        assert (orders[0] == np.arange(size)).mean() < 0.1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.integers(), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_sample_does_not_depend_on_which_others_are_looked_up(
    size: int, seed: int, samples: list[int]
) -> None:
    order = SampleOrder(size, seed)
    epochs, indices = order(np.array(samples))
    for sample, epoch, index in zip(samples, epochs.tolist(), indices.tolist(), strict=True):
        assert (epoch, index) == tuple(int(value[0]) for value in order(np.array([sample])))
        assert epoch == sample // size and 0 <= index < size


def test_an_order_needs_a_sequence() -> None:
    with pytest.raises(ValueError, match="size=0"):
        SampleOrder(0, seed=1)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_small_stores_see_every_order_equally_often(size: int) -> None:
    epochs = 60 * math.factorial(size)
    _, indices = SampleOrder(size, seed=11)(np.arange(epochs * size))
    code = indices.reshape(epochs, size) @ size ** np.arange(size)
    counts = {
        sum(p * size**i for i, p in enumerate(order)): 0 for order in itertools.permutations(range(size))
    }
    counts.update(zip(*(part.tolist() for part in np.unique(code, return_counts=True)), strict=True))
    assert len(counts) == math.factorial(size)
    assert_uniform(list(counts.values()))


def test_places_and_proteins_are_independent_in_large_stores() -> None:
    size, cells = 100_000, 10
    _, indices = SampleOrder(size, seed=3)(np.arange(size))
    table = np.bincount(np.arange(size) * cells // size * cells + indices * cells // size, minlength=cells**2)
    assert_uniform(table)
    steps = np.diff(indices) % size  # neighbours in the order are not neighbours in the store
    assert_uniform(np.bincount(steps * 50 // size, minlength=50))


def test_uniform_numbers_are_uniform_in_each_direction() -> None:
    uniform = counter_rng.uniforms(bits(1, Purpose.MASK, 1000, 1000))
    assert ((uniform >= 0) & (uniform < 1)).all()
    cell = (uniform * 100).astype(int)
    assert_uniform(np.bincount(cell.ravel(), minlength=100))
    for line in (cell[0], cell[999], cell[:, 0], cell[:, 999], cell.diagonal()):
        assert_uniform(np.bincount(line, minlength=100))
    # Row and column sums of uniforms have mean 500 and variance 1000 / 12.
    for axis in (0, 1):
        scores = (uniform.sum(axis=axis) - 500) / math.sqrt(1000 / 12)
        assert np.abs(scores).max() < 5 and abs(scores.var() - 1) < 0.25


def test_every_bit_is_a_fair_coin() -> None:
    drawn = bits(1, Purpose.MASK, 500, 200).ravel()
    for bit in range(64):
        ones = int(((drawn >> np.uint64(bit)) & np.uint64(1)).sum())
        assert abs(ones - 50_000) < 5 * math.sqrt(25_000)


@pytest.mark.parametrize(
    "other",
    [
        lambda n, m: bits(1, Purpose.RESIDUE, n, m),
        lambda n, m: bits(2, Purpose.MASK, n, m),
        lambda n, m: bits(1, Purpose.MASK, n, m + 1)[:, 1:],
        lambda n, m: bits(1, Purpose.MASK, n + 1, m)[1:],
        lambda n, m: bits(1, Purpose.MASK, n + 1, m + 1)[1:, 1:],
        lambda n, m: bits(1, Purpose.MASK, max(n, m), max(n, m)).T[:n, :m],
    ],
    ids=["purpose", "seed", "position", "sample", "sample and position", "swapped"],
)
def test_numbers_next_to_each_other_are_independent(other) -> None:  # type: ignore[no-untyped-def]
    first, second = bits(1, Purpose.MASK, 500, 400), other(500, 400)
    different = first != second
    assert different.sum() >= first.size - 500  # only the diagonal of "swapped" is equal
    cells = 16
    a, b = ((counter_rng.uniforms(part[different]) * cells).astype(int) for part in (first, second))
    assert_uniform(np.bincount(a * cells + b, minlength=cells**2))
    # Bit by bit too: half of the 64 bits differ.
    flipped = np.unpackbits((first ^ second)[different].view(np.uint8)).reshape(-1, 64).sum(axis=0)
    assert (np.abs(flipped - different.sum() / 2) < 5 * math.sqrt(different.sum() / 4)).all()


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**200 + 7])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= counter_rng.derive_seed(seed, Purpose.ORDER) < 2**64


def test_seeds_and_purposes_give_different_keys() -> None:
    keys = {counter_rng.derive_seed(seed, purpose) for seed in range(-500, 500) for purpose in Purpose}
    assert len(keys) == 1000 * len(Purpose)


def test_integers_below_are_uniform() -> None:
    drawn = counter_rng.integers_below(bits(1, Purpose.CROP, 10_000, 10).ravel(), 7)
    assert_uniform(np.bincount(drawn, minlength=7))


def test_crop_starts_are_uniform_with_the_last_window_included() -> None:
    starts = crop_starts(9, np.arange(60_000), np.full(60_000, 34), 24)
    assert set(starts.tolist()) == set(range(11))  # 34 - 24 = 10 is the last start
    assert_uniform(np.bincount(starts, minlength=11))


def test_crop_leaves_what_fits_alone_and_start_keeps_the_beginning() -> None:
    lengths = np.array([3, 1023, 1024, 1025, 9000])
    assert crop_starts(9, np.arange(5), lengths, 1024)[:3].tolist() == [0, 0, 0]
    assert crop_starts(9, np.arange(5), lengths, 1024, "start").tolist() == [0] * 5
    with pytest.raises(ValueError, match="data.crop='middle'"):
        crop_starts(9, np.arange(5), lengths, 1024, "middle")
