"""The proven training takes the same proteins at every micro-batch size, with label counts that differ."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from esm2mega.batch import PackedBatch
from esm2mega.config.load import load_run
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import TrainStream
from esm2mega.prove.layouts import PROTEINS_PER_STEP, Layout
from esm2mega.prove.training import STEPS, settings, write_stores


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stores(tmp_path_factory.mktemp("training"))


def steps(stores: Path, packed: int, dp_size: int = 1) -> list[list[PackedBatch]]:
    """The micro-batches of every step, those of all ranks together."""
    overrides = settings(stores, Path("unused"), "fp64", seed=7, stop=STEPS)
    run = load_run(None, [*overrides, *Layout(packed=packed).settings()])
    spec = BatchSpec(run.data, run.train.micro_batch_tokens, run.seed)
    store = TokenStore(stores / "train")
    count = PROTEINS_PER_STEP // packed // dp_size
    taken: list[list[PackedBatch]] = [[] for _ in range(STEPS)]
    for rank in range(dp_size):
        with TrainStream([store], spec, rank, dp_size) as stream:
            for step in taken:
                step += islice(stream, count)
    return taken


def proteins(batches: list[PackedBatch]) -> Counter[tuple[int, ...]]:
    """What the model sees of each protein, masks included."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        pieces = batch.input_ids.split(batch.seqlens)[: batch.num_sequences]
        found.update(tuple(piece.tolist()) for piece in pieces)
    return found


@pytest.mark.parametrize(("packed", "dp_size"), [(2, 1), (3, 2), (4, 3), (6, 2), (12, 1), (1, 4)])
def test_every_micro_batch_size_trains_on_the_same_proteins(stores: Path, packed: int, dp_size: int) -> None:
    for alone, together in zip(steps(stores, 1), steps(stores, packed, dp_size), strict=True):
        assert proteins(together) == proteins(alone)
        assert sum(proteins(alone).values()) == PROTEINS_PER_STEP
        assert {batch.num_sequences for batch in together} == {packed}


def test_label_counts_differ_widely_and_include_zero(stores: Path) -> None:
    for step in steps(stores, 1):
        counts = [batch.labels.numel() for batch in step]
        assert min(counts) == 0 and max(counts) >= 8
    some = [batch for step in steps(stores, 1) for batch in step]
    assert len({tuple(batch.seqlens) for batch in some}) > 1, "no pack has a tail of padding"


def test_seed_decides(stores: Path) -> None:
    assert f"seed={3}" in settings(stores, Path("run"), "fp64", seed=3, stop=2)
