"""Samples: literal sequences, uniform clusters and members, exact mixtures, crops and chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2mega.config.schema import DataConfig
from esm2mega.data.stream.samples import (
    MIXTURE_BLOCK,
    EvalSamples,
    Mixture,
    Pieces,
    TrainSamples,
    chunk,
    piece_name,
)
from esm2mega.errors import UserError
from tests.unit.data.chi_square import assert_uniform
from tests.unit.data.lengths import Lengths

# Ten proteins in four clusters of 4, 1, 3 and 2, in no order.
LENGTHS = [30, 40, 10, 20, 50, 60, 70, 80, 90, 100]
CLUSTERS = [[7, 1, 2, 9], [4], [5, 6, 0], [8, 3]]


def samples_of(*stores: Lengths, seed: int = 1234, **config: Any) -> TrainSamples:
    return TrainSamples(stores, DataConfig(**config), seed)  # type: ignore[arg-type]


def columns(pieces: Pieces) -> list[list[int]]:
    return [
        part.tolist() for part in (pieces.samples, pieces.stores, pieces.rows, pieces.starts, pieces.lengths)
    ]


def test_samples_of_a_tiny_mapping_are_pinned() -> None:
    samples = samples_of(Lengths(LENGTHS, CLUSTERS), max_seq_length=50)
    pieces = samples(np.arange(12))
    assert pieces.rows.tolist() == [4, 8, 6, 7, 0, 3, 1, 4, 0, 9, 8, 4]
    assert pieces.starts.tolist() == [2, 22, 19, 3, 0, 0, 0, 0, 0, 25, 42, 0]
    assert pieces.lengths.tolist() == [50, 50, 50, 50, 32, 22, 42, 50, 32, 50, 50, 50]
    cluster_of = {row: number for number, rows in enumerate(CLUSTERS) for row in rows}
    drawn = [cluster_of[row] for row in pieces.rows.tolist()]
    assert drawn == [1, 3, 2, 0, 2, 3, 0, 1, 2, 0, 3, 1]  # every epoch of four holds each cluster once


def test_clusters_and_members_are_uniform() -> None:
    sizes = np.random.default_rng(0).integers(1, 12, size=40)
    rows = np.random.default_rng(1).permutation(int(sizes.sum()))
    clusters = [part.tolist() for part in np.split(rows, np.cumsum(sizes)[:-1])]
    draws = 100_000
    drawn = samples_of(Lengths(np.full(len(rows), 50), clusters), seed=7)(np.arange(draws)).rows
    cluster_of = np.repeat(np.arange(40), sizes)[np.argsort(rows)]
    counts = np.bincount(cluster_of[drawn], minlength=40)
    assert counts.min() == counts.max() == draws // 40  # whole epochs: exactly equal
    assert_uniform(np.bincount(cluster_of[drawn[::40]], minlength=40))  # and anyone may come first
    counts = np.bincount(drawn, minlength=len(rows))
    for members in clusters:
        if len(members) > 1:
            assert_uniform(counts[members])
    # The member drawn in one epoch says nothing on the next one.
    pair = next(number for number, size in enumerate(sizes) if size == 2)
    chosen = (drawn[cluster_of[drawn] == pair] == clusters[pair][0]).astype(int)
    assert_uniform(np.bincount(chosen[:-1] * 2 + chosen[1:], minlength=4))


def test_sampling_is_by_clusters_where_there_are_some() -> None:
    with_clusters, without = Lengths(LENGTHS, CLUSTERS), Lengths(LENGTHS)
    assert (
        samples_of(with_clusters).epoch_size == samples_of(with_clusters, sampling="clusters").epoch_size == 4
    )
    assert samples_of(with_clusters, sampling="sequences").epoch_size == samples_of(without).epoch_size == 10
    np.testing.assert_array_equal(
        samples_of(with_clusters, sampling="sequences")(np.arange(30)).rows,
        samples_of(without)(np.arange(30)).rows,
    )
    assert not samples_of(with_clusters).takes_all and samples_of(without).takes_all
    with pytest.raises(UserError, match="data.sampling=clusters, but store has no clusters: make it with"):
        samples_of(without, sampling="clusters")


def test_evaluation_takes_every_protein_whatever_the_clusters() -> None:
    store = Lengths(LENGTHS, CLUSTERS)
    pieces = EvalSamples(store, DataConfig(max_seq_length=50), 5)(np.arange(10))  # type: ignore[arg-type]
    assert sorted(pieces.rows.tolist()) == list(range(10))
    assert pieces.samples.tolist() == pieces.rows.tolist()


def test_the_last_residue_is_reached() -> None:
    pieces = samples_of(Lengths([60, 5]), max_seq_length=50)(np.arange(4000))
    starts = pieces.starts[pieces.rows == 0]
    assert_uniform(
        np.bincount(starts, minlength=13)
    )  # 62 tokens, windows from 0 to 12: the last ends with <eos>
    assert (pieces.starts + pieces.lengths)[pieces.rows == 0].max() == 62


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 2**40))
def test_mixtures_are_exact_in_every_block(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, seed)
    assert mixture.shares.sum() == MIXTURE_BLOCK
    np.testing.assert_allclose(mixture.shares, np.array(weights) / sum(weights) * MIXTURE_BLOCK, atol=1)
    stores, numbers = mixture(np.arange(2 * MIXTURE_BLOCK))
    for store, share in enumerate(mixture.shares.tolist()):
        own = numbers[stores == store]
        np.testing.assert_array_equal(np.sort(own[own < share]), np.arange(share))
        np.testing.assert_array_equal(np.sort(own), np.arange(2 * share))
        assert (stores[:MIXTURE_BLOCK] == store).sum() == share


def test_mixtures_are_pinned_and_mixed_at_once() -> None:
    stores = (Lengths([5] * 6), Lengths([7] * 4, [[0, 1], [2, 3]]))
    samples = samples_of(*stores, weights=[3, 1])
    assert columns(samples(np.arange(16)))[1:3] == [
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0],
        [0, 0, 5, 5, 0, 0, 1, 4, 3, 2, 4, 3, 3, 5, 0, 0],
    ]
    assert samples.epoch_size is None and not samples.takes_all
    assert samples.describe() == [
        "6 sequences of store, 75.00% of the samples",
        "2 clusters of 4 sequences of store, 25.00% of the samples",
    ]
    dealt = samples(np.arange(MIXTURE_BLOCK)).stores
    in_parts = dealt.reshape(64, -1).sum(axis=1)  # 1024 samples each, 256 of them from the second store
    assert np.abs(in_parts - 256).max() < 5 * np.sqrt(1024 * 0.25 * 0.75)
    # Without weights as if the stores were one: 6 proteins to 2 clusters.
    assert samples_of(*stores).identity()["data.weights"] == [49152, 16384]


def test_stores_of_a_mixture_have_orders_of_their_own() -> None:
    samples = samples_of(Lengths([5] * 100), Lengths([5] * 100))
    pieces = samples(np.arange(MIXTURE_BLOCK))
    orders = [[0] * 100, [0] * 100]
    _, numbers = Mixture([1, 1], 1234)(np.arange(MIXTURE_BLOCK))
    for store, number, row in zip(
        pieces.stores.tolist(), numbers.tolist(), pieces.rows.tolist(), strict=True
    ):
        if number < 100:
            orders[store][number] = row
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100))
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 10


def test_a_weight_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"store number 2 has less than 1/65536 of the sum"):
        Mixture([1, 1e-6], 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20), st.sampled_from(["random", "chunk"]))
def test_a_sample_does_not_depend_on_the_others(numbers: list[int], crop: str) -> None:
    stores = (Lengths(LENGTHS, CLUSTERS), Lengths([200, 3, 5]))
    samples = samples_of(*stores, weights=[0.3, 0.7], max_seq_length=20, crop=crop)
    together = columns(samples(np.array(numbers)))
    alone = [columns(samples(np.array([number]))) for number in numbers]
    assert together == [sum((part[i] for part in alone), []) for i in range(5)]


def test_chunks_of_the_published_example() -> None:
    # 2050 residues, 1024 at most: 684, 683 and 683.
    proteins, starts, lengths = chunk([2052, 1026, 1027], 1026)
    assert proteins.tolist() == [0, 0, 0, 1, 2, 2]
    assert starts.tolist() == [0, 685, 1368, 0, 0, 514]
    assert lengths.tolist() == [685, 683, 684, 1026, 514, 513]
    residues = [2050, 2050, 2050, 1024, 1025, 1025]
    names = map(piece_name, "aaabcc", starts.tolist(), lengths.tolist(), residues)
    assert list(names) == ["a/1-684", "a/685-1367", "a/1368-end", "b", "c/1-513", "c/514-end"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=10), st.integers(3, 200))
def test_chunks_are_balanced_and_hold_everything_once(residues: list[int], longest: int) -> None:
    proteins, starts, lengths = chunk(np.array(residues) + 2, longest)
    assert lengths.max() <= longest
    for number, count in enumerate(residues):
        own = proteins == number
        # numpy splits the same way: sizes that differ by one at most, the larger ones first.
        expected = np.array_split(np.arange(1, count + 1), -(-count // (longest - 2)))
        expected[0] = np.concatenate([[0], expected[0]])
        expected[-1] = np.concatenate([expected[-1], [count + 1]])
        assert starts[own].tolist() == [int(part[0]) for part in expected]
        assert lengths[own].tolist() == [len(part) for part in expected]


def test_names_of_crops_and_chunks() -> None:
    samples = samples_of(Lengths([60, 5]), max_seq_length=32, crop="chunk")
    assert sorted(samples.names(samples(np.arange(2)))) == ["p0/1-30", "p0/31-end", "p1"]
    assert piece_name("p", 3, 10, 20) == "p/3-12"
    assert piece_name("p", 0, 10, 20) == "p/1-9"


@pytest.mark.parametrize(
    ("other", "keys"),
    [
        (
            samples_of(Lengths(LENGTHS, CLUSTERS), sampling="sequences"),
            {"data.sampling", "data.train (fingerprint)"},
        ),
        (samples_of(Lengths(LENGTHS, CLUSTERS), crop="chunk"), {"data.crop"}),
        (samples_of(Lengths(LENGTHS, CLUSTERS), max_seq_length=99), {"data.max_seq_length"}),
        (samples_of(Lengths(LENGTHS, CLUSTERS), seed=2), {"seed"}),
        (
            samples_of(Lengths(LENGTHS, CLUSTERS), Lengths([3])),
            {"data.train (fingerprint)", "data.sampling", "data.weights"},
        ),
    ],
)
def test_identity_names_what_changed(other: TrainSamples, keys: set[str]) -> None:
    mine, theirs = samples_of(Lengths(LENGTHS, CLUSTERS)).identity(), other.identity()
    assert {key for key in mine if mine[key] != theirs[key]} == keys


def test_identity_covers_the_mapping() -> None:
    store = Lengths(LENGTHS, CLUSTERS)
    before = samples_of(store).identity()
    store.manifest["files"]["clusters.members.npy"]["sha256"] = "1" * 64
    assert samples_of(store).identity() != before
