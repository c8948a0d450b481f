"""Batches: chunks and padded batches hold the same proteins with the same masks, and residues are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.data.stream.build import (
    PADDING,
    BatchArrays,
    BatchSpec,
    build_arrays,
    token_counts,
    train_plan,
)
from esm2mega.data.stream.masking import mask_tokens
from esm2mega.data.stream.packing import Pack, PackCursor
from esm2mega.data.stream.samples import TrainSamples

SPEC = BatchSpec(DataConfig(max_seq_length=64, pack_window=200), micro_batch_tokens=256, seed=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """40 proteins of 1 to 274 residues, all 25 letters."""
    random = np.random.default_rng(4)
    path = tmp_path_factory.mktemp("batch") / "store"
    with StoreWriter(path) as writer:
        for i in range(40):
            residues = random.choice(list("LAGVSERTIDPKQNFYMHWCXBUZO"), size=1 + 7 * i)
            writer.append([f"p{i}"], ["".join(residues).encode()])
    return TokenStore(path)


def batches_of(store: TokenStore, **changes: Any) -> list[tuple[Pack, BatchArrays]]:
    """The packs of one epoch and what became of them."""
    spec = replace(SPEC, max_epochs=1, data=replace(SPEC.data, **changes))
    samples = TrainSamples([store], spec.data, spec.seed)
    packs, _ = train_plan(samples, spec).take(PackCursor(), 10_000)
    return [(pack, build_arrays([store], spec, pack)) for pack in packs]


def pieces_of(store: TokenStore, **changes: Any) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """Of each piece, named by row and start, the tokens that the model sees and the original ones."""
    found = {}
    for pack, batch in batches_of(store, **changes):
        originals = batch.input_ids.copy()
        originals[batch.label_positions] = batch.labels
        pieces = pack.pieces
        for row, start, length, offset in zip(
            pieces.rows.tolist(), pieces.starts.tolist(), pieces.lengths, pack.offsets, strict=True
        ):
            tokens = slice(offset, offset + length)
            found[row, start] = (batch.input_ids[tokens].tolist(), originals[tokens].tolist())
    return found


def whole(store: TokenStore, row: int) -> np.ndarray:
    tokens = [vocabulary.CLS, *store.residues(row).tolist(), vocabulary.EOS]
    return np.array(tokens, dtype=np.uint8)


def test_chunks_of_a_protein_make_it_whole_and_masked_as_one(store: TokenStore) -> None:
    chunks = pieces_of(store, crop="chunk")
    assert len(chunks) > 100 and max(len(seen) for seen, _ in chunks.values()) <= 64
    samples = TrainSamples([store], SPEC.data, SPEC.seed)
    sample_of = {int(row): k for k, row in enumerate(samples(np.arange(40)).rows)}
    for row in range(40):
        seen, originals = (
            sum((chunks[key][part] for key in sorted(chunks) if key[0] == row), []) for part in (0, 1)
        )
        tokens = whole(store, row)
        assert originals == tokens.tolist()
        one = mask_tokens(tokens, np.array([sample_of[row]]), np.array([len(tokens)]), SPEC.seed, SPEC.data)
        assert seen == one.input_ids.tolist()


@pytest.mark.parametrize("crop", ["random", "chunk"])
def test_padded_batches_hold_what_packs_hold(store: TokenStore, crop: str) -> None:
    assert pieces_of(store, crop=crop, packing="bucket") == pieces_of(store, crop=crop, packing="pack")


@pytest.mark.parametrize("packing", ["pack", "bucket"])
def test_segments_are_proteins_or_padding(store: TokenStore, packing: str) -> None:
    padding = 0
    for pack, batch in batches_of(store, packing=packing):
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.input_ids) == 256
        starts, ends = batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()
        segments = [batch.input_ids[start:end] for start, end in zip(starts, ends, strict=True)]
        is_padding = [(segment == vocabulary.PAD).all() for segment in segments]
        assert [len(part) for part, pad in zip(segments, is_padding, strict=True) if not pad] == (
            pack.pieces.lengths.tolist()
        )
        assert batch.num_tokens == pack.num_tokens == (batch.input_ids != vocabulary.PAD).sum()
        assert batch.num_sequences == pack.num_pieces
        padding = max(padding, sum(is_padding))
    # Packs are padded at their end, buckets behind each protein but the longest.
    assert padding == 1 if packing == "pack" else padding > 1


def test_counts_of_a_plain_store_are_its_own(store: TokenStore) -> None:
    samples = TrainSamples([store], SPEC.data, 1)
    np.testing.assert_array_equal(token_counts(samples), store.token_counts)


def test_counts_of_clusters_are_those_of_what_is_drawn(tmp_path: Path) -> None:
    """One cluster of a single A against one of 99 times LL: residues come 1 to 2, not 1 to 198."""
    with StoreWriter(tmp_path / "store") as writer:
        writer.append([f"p{i}" for i in range(100)], [b"A", *[b"LL"] * 99])
        writer.append_clusters(["single", "many"], np.array([1, 99]), np.arange(100))
    store = TokenStore(tmp_path / "store")
    plain = token_counts(TrainSamples([store], replace(SPEC.data, sampling="sequences"), 1))
    counts = token_counts(TrainSamples([store], SPEC.data, 1))
    a, leucine = vocabulary.encode_residues("AL").tolist()
    assert plain[leucine] == 198 * plain[a]
    assert counts[leucine] == 2 * counts[a] == 16384
    assert counts.sum() == counts[a] + counts[leucine]


def test_counts_of_a_mixture_follow_the_weights(tmp_path: Path) -> None:
    for name, residues in (("a", b"A"), ("l", b"L")):
        with StoreWriter(tmp_path / name) as writer:
            writer.append(["p"], [residues])
    stores = [TokenStore(tmp_path / name) for name in ("a", "l")]
    counts = token_counts(TrainSamples(stores, replace(SPEC.data, weights=[9.0, 1.0]), 1))
    a, leucine = vocabulary.encode_residues("AL").tolist()
    assert counts.sum() == counts[a] + counts[leucine] == 16384
    assert counts[leucine] / 16384 == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / 16384))


@pytest.mark.parametrize("multiple", [1, 24, 1000])
def test_packs_with_room_left_end_behind_their_last_protein(store: TokenStore, multiple: int) -> None:
    """They hold the same proteins with the same masks, and cost what these cost."""
    spec = replace(SPEC, max_epochs=1, global_batch_size=7, tail_multiple=multiple)
    samples = TrainSamples([store], spec.data, spec.seed)
    packs, _ = train_plan(samples, spec).take(PackCursor(), 10_000)
    assert packs and any(pack.num_tokens < 200 for pack in packs)
    for pack in packs:
        short = build_arrays([store], spec, pack)
        full = build_arrays([store], replace(spec, tail_multiple=None), pack)
        length = len(short.input_ids)
        assert length == min(-(-pack.num_tokens // multiple) * multiple, 256)
        assert np.array_equal(short.input_ids, full.input_ids[:length]) and len(full.input_ids) == 256
        assert short.cu_seqlens[-1] == length and short.starts == full.starts
        assert np.array_equal(short.label_positions, full.label_positions)
        assert pack.cost == int((pack.pieces.lengths**2).sum())
    assert len(build_arrays([store], spec, PADDING).input_ids) == min(multiple, 256)
    padded = replace(spec, data=replace(spec.data, packing="bucket"))
    assert {padded.capacity(pack) for pack in packs} == {256}
