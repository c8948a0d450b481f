"""Batches: exact content, the same data for any number of ranks and any resume, fixed evaluation."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from esm2mega import vocabulary
from esm2mega.batch import PackedBatch
from esm2mega.config.schema import DataConfig, EvalConfig
from esm2mega.data.store.shards import SHARD_UNIT
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.data.stream.build import BatchSpec, train_plan
from esm2mega.data.stream.loader import EvalPacks, TrainStream, build_batch
from esm2mega.data.stream.packing import Pack, PackCursor, PackWindow
from esm2mega.data.stream.samples import Pieces, TrainSamples
from esm2mega.errors import UserError

if TYPE_CHECKING:
    from tests.unit.data.conftest import WriteStore

AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
SPEC = BatchSpec(DataConfig(max_seq_length=64, pack_window=100), micro_batch_tokens=256, seed=1)
MASKS = EvalConfig()


def digest(batch: PackedBatch, names: list[str] | None = None) -> str:
    """Identity of everything the model and the loss see, and of the names of the proteins."""
    numbers = [batch.seqlens, batch.max_seqlen, batch.num_tokens]
    content = hashlib.sha256(json.dumps(numbers if names is None else [*numbers, names]).encode())
    for tensor in (batch.input_ids, batch.cu_seqlens, batch.label_positions, batch.labels):
        content.update(str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return content.hexdigest()


def make_pack(
    samples: list[int], rows: list[int], lengths: list[int], starts: list[int] | None = None
) -> Pack:
    stores, starts = [0] * len(rows), starts or [0] * len(rows)
    pieces = Pieces(*(np.array(part, dtype=np.int64) for part in (samples, stores, rows, starts, lengths)))
    offsets = np.cumsum(pieces.lengths) - pieces.lengths
    return Pack(PackWindow(pieces, offsets, [0, len(rows)], [sum(lengths)], [0]), 0)


def originals(batch: PackedBatch) -> list[str]:
    """The proteins of a batch before masking, as text."""
    tokens = batch.input_ids.clone()
    tokens[batch.label_positions] = batch.labels
    chosen = torch.zeros_like(tokens).index_fill(0, batch.label_positions, 1)
    assert batch.label_counts == [int(part.sum()) for part in chosen.split(batch.seqlens)]
    pieces = tokens.split(batch.seqlens)[: batch.num_sequences]
    return [vocabulary.decode(piece.numpy()) for piece in pieces]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """60 proteins of 1 to 119 residues."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("loader") / "store"
    with StoreWriter(path) as writer:
        for i in range(60):
            writer.append([f"p{i}"], ["".join(random.choice(list(AMINO_ACIDS), size=1 + 2 * i)).encode()])
    return TokenStore(path)


def test_batch_by_hand(write_store: WriteStore) -> None:
    store = write_store(["MKTL", "acJ", "W" * 20])
    spec = BatchSpec(DataConfig(max_seq_length=8, mlm_probability=1e-9), micro_batch_tokens=16, seed=1)
    batch = build_batch([store], spec, make_pack([10, 11], [0, 1], [6, 5]))
    assert batch.input_ids.tolist() == [0, 20, 15, 11, 4, 2, 0, 5, 23, 3, 2, 1, 1, 1, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 6, 11, 16]
    assert batch.seqlens == [6, 5, 5] and batch.max_seqlen == 6
    assert (batch.num_tokens, batch.num_residues, batch.num_sequences) == (11, 7, 2)
    assert batch.labels.tolist() == batch.label_positions.tolist() == []
    assert batch.label_counts == [0, 0, 0]
    assert batch.input_ids.dtype == batch.labels.dtype == batch.label_positions.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


def test_a_full_pack_has_no_padding_segment(write_store: WriteStore) -> None:
    store = write_store(["MKTL", "AC"])
    spec = BatchSpec(DataConfig(max_seq_length=8), micro_batch_tokens=10, seed=1)
    batch = build_batch([store], spec, make_pack([0, 1], [0, 1], [6, 4]))
    assert batch.seqlens == [6, 4] and batch.cu_seqlens.tolist() == [0, 6, 10]


def test_windows_reach_both_ends_and_hold_specials_only_there(write_store: WriteStore) -> None:
    whole = AMINO_ACIDS + "X"  # 21 residues, 23 tokens, windows of 20: starts 0 to 3
    store = write_store([whole])
    spec = BatchSpec(DataConfig(max_seq_length=20), micro_batch_tokens=20, seed=1)
    with TrainStream([store], spec) as stream:
        batches = list(itertools.islice(stream, 60))
    windows = {text: batch.num_residues for batch in batches for text in originals(batch)}
    assert windows == {
        "<cls>" + whole[:19]: 19,
        whole[:20]: 20,
        whole[1:21]: 20,
        whole[2:21] + "<eos>": 19,
    }
    with TrainStream([store], replace(spec, data=replace(spec.data, crop="start"))) as stream:
        assert originals(next(stream)) == ["<cls>" + whole[:19]]


def test_to_moves_every_tensor_and_nothing_else(store: TokenStore) -> None:
    with TrainStream([store], SPEC) as stream:
        batch = next(stream)
    moved = batch.to("meta")
    for name in ("input_ids", "cu_seqlens", "label_positions", "labels"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.seqlens is batch.seqlens and moved.num_tokens == batch.num_tokens
    assert digest(batch.to("cpu")) == digest(batch)


def test_an_epoch_is_read_completely_and_exactly(store: TokenStore) -> None:
    whole = replace(SPEC, data=replace(SPEC.data, max_seq_length=128, pack_window=60))
    with TrainStream([store], whole) as stream:
        seen: list[str] = []
        while stream.state.consumed_samples < 120:
            seen += originals(next(stream))
    proteins = [f"<cls>{vocabulary.decode(store.residues(i))}<eos>" for i in range(60)]
    assert sorted(seen[:60]) == sorted(seen[60:]) == sorted(proteins)
    assert seen[:60] != seen[60:]


def test_batches_are_pinned(store: TokenStore) -> None:
    with TrainStream([store], SPEC) as stream:
        digests = [digest(batch)[:16] for batch in itertools.islice(stream, 3)]
    assert digests == ["0f130e0fc6ac9614", "707d911d59135a6c", "7fa2d365bd3212b1"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """3,000 proteins of 20 to 400 residues."""
    random = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("loader") / "many"
    letters = np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)
    texts = [random.choice(letters, size=size).tobytes() for size in random.integers(20, 401, size=3000)]
    with StoreWriter(path) as writer:
        writer.append([f"p{i}" for i in range(3000)], texts)
    return TokenStore(path)


LONG = BatchSpec(DataConfig(max_seq_length=256, pack_window=4000), micro_batch_tokens=2048, seed=1)
PACKS = 1032  # a multiple of 1, 2, 3 and 8; 10,000 samples and more


@dataclass(frozen=True)
class Read:
    """The first packs, read by one process in a thread.

    Attributes:
        digests: Of each pack: ids, crops, masks, who shares a pack.
        sequences, tokens: Their sums.
    """

    digests: list[str]
    sequences: int
    tokens: int


@pytest.fixture(scope="module")
def reference(many: TokenStore) -> Read:
    packs, _ = train_plan(TrainSamples([many], LONG.data, LONG.seed), LONG).take(PackCursor(), PACKS)
    assert sum(pack.num_pieces for pack in packs) > 10_000
    with TrainStream([many], LONG) as stream:
        batches = list(itertools.islice(stream, PACKS))
        names = [stream.samples.names(pack.pieces) for pack in packs]
    return Read(
        [digest(batch, ids) for batch, ids in zip(batches, names, strict=True)],
        sum(batch.num_sequences for batch in batches),
        sum(batch.num_tokens for batch in batches),
    )


def read_ranks(
    store: TokenStore,
    dp_size: int,
    packs: int,
    workers: int,
    state: dict[str, Any] | None = None,
    micro_batches: int = 1,
) -> tuple[list[str], dict[str, Any]]:
    """Digests of the next packs in pack order, read by `dp_size` ranks, and the state behind them."""
    spec = replace(LONG, data=replace(LONG.data, workers=workers))
    found: dict[int, str] = {}
    states: list[dict[str, Any]] = []
    for rank in range(dp_size):
        with TrainStream([store], spec, rank, dp_size) as stream:
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            first = stream.state.consumed_packs
            planned, _ = train_plan(stream.samples, spec).take(stream.state.cursor, packs)
            for _ in range(packs // (dp_size * micro_batches)):
                for batch in stream.next_step(micro_batches):
                    assert batch.pack not in found
                    names = stream.samples.names(planned[batch.pack - first].pieces)
                    found[batch.pack] = digest(batch, names)
            states.append(stream.state_dict())
    assert all(other == states[0] for other in states)
    assert sorted(found) == list(range(first, first + packs))
    return [found[number] for number in sorted(found)], states[0]


@pytest.mark.parametrize(
    ("dp_size", "workers", "micro_batches"),
    [
        *((3, 2, 4), (8, 0, 3)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, 0, 1), (1, 2, 4), (2, 0, 43), (2, 2, 1), (3, 0, 8), (8, 2, 1))
        ),
    ],
)
def test_data_are_the_same_for_every_number_of_ranks_and_workers(
    many: TokenStore, reference: Read, dp_size: int, workers: int, micro_batches: int
) -> None:
    digests, state = read_ranks(many, dp_size, PACKS, workers, micro_batches=micro_batches)
    assert digests == reference.digests
    assert state["consumed_packs"] == PACKS
    assert state["consumed_samples"] == reference.sequences
    assert state["consumed_tokens"] == reference.tokens
    assert state["cursor"]["window"] >= 2  # the test crosses borders between windows


# Places drawn at random, rounded to whole steps.
@pytest.mark.parametrize(
    ("before", "after", "workers", "stop"),
    [
        *((1, 2, 0, 391), (3, 8, 2, 129)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 3, 2, 740), (8, 1, 0, 1016))),
    ],
)
def test_a_resume_continues_with_any_number_of_ranks_and_workers(
    many: TokenStore, reference: Read, before: int, after: int, workers: int, stop: int
) -> None:
    first, state = read_ranks(many, before, stop, workers)
    rest = (PACKS - stop) // (2 * after) * 2 * after
    second, _ = read_ranks(many, after, rest, 2 - workers, state, micro_batches=2)
    assert first + second == reference.digests[: stop + rest]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_state_ignores_what_was_built_ahead(store: TokenStore, workers: int) -> None:
    spec = replace(SPEC, data=replace(SPEC.data, workers=workers))
    with TrainStream([store], SPEC) as stream:
        reference = [digest(batch) for batch in itertools.islice(stream, 2)]
    with TrainStream([store], spec) as stream:
        assert stream.state_dict()["consumed_packs"] == 0
        next(stream)
        time.sleep(0.05)  # the second batch is built meanwhile
        state = stream.state_dict()
        assert state["consumed_packs"] == 1
        stream.close()
        assert digest(next(stream)) == reference[1]  # a closed stream goes on where it stood
        stream.load_state_dict(state)
        assert digest(next(stream)) == reference[1]


def test_clusters_in_shards_and_mixtures_are_the_same_from_worker_processes(
    store: TokenStore, tmp_path: Path
) -> None:
    """Worker processes open the stores by path; ranks and workers must meet the same samples there."""
    random = np.random.default_rng(7)
    letters = np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)
    with StoreWriter(tmp_path / "clustered", shard_bytes=SHARD_UNIT) as writer:
        writer.append(["long"], [random.choice(letters, size=SHARD_UNIT + 5).tobytes()])
        sizes = random.integers(20, 200, size=299)
        writer.append(
            [f"c{i}" for i in range(299)], [random.choice(letters, size=n).tobytes() for n in sizes]
        )
        writer.append_clusters([f"k{j}" for j in range(100)], np.full(100, 3), random.permutation(300))
    clustered = TokenStore(tmp_path / "clustered")
    assert len(list(clustered.path.glob("tokens-*.bin"))) == 2
    for stores, weights in (([clustered], None), ([clustered, store], [0.3, 0.7])):
        spec = replace(SPEC, data=replace(SPEC.data, weights=weights))
        with TrainStream(stores, spec) as stream:
            assert stream.samples.identity()["data.sampling"][0] == "clusters"
            reference = [digest(batch) for batch in itertools.islice(stream, 100)]
        spec = replace(spec, data=replace(spec.data, workers=2))
        for rank in range(2):
            with TrainStream(stores, spec, rank, 2) as stream:
                digests = [digest(batch) for batch in itertools.islice(stream, 50)]
            assert digests == reference[rank::2]


def test_epochs_end_in_padding(store: TokenStore) -> None:
    spec = replace(SPEC, max_epochs=3, data=replace(SPEC.data, max_seq_length=128))
    for dp_size in (1, 3):
        seen: list[str] = []
        for rank in range(dp_size):
            with TrainStream([store], spec, rank, dp_size) as stream:
                num_packs = stream.num_packs()
                batches = list(itertools.islice(stream, -(-num_packs // dp_size) + 2))
                seen += [text for batch in batches for text in originals(batch)]
                assert stream.state.consumed_packs == num_packs
                assert stream.state.consumed_samples == 3 * 60
            for batch in batches[-2:]:
                assert batch.input_ids.tolist() == [vocabulary.PAD] * 256 and not len(batch.labels)
        proteins = [f"<cls>{vocabulary.decode(store.residues(i))}<eos>" for i in range(60)]
        assert sorted(seen) == sorted(3 * proteins)


@pytest.mark.parametrize("crop", ["random", "chunk"])
def test_passes_of_the_first_packs(store: TokenStore, crop: str) -> None:
    """As a count of the batches says; chunks of a protein are one pass of it, and padding is none."""
    spec = replace(SPEC, data=replace(SPEC.data, max_seq_length=32, crop=crop))
    total = int(store.lengths.sum()) + 2 * len(store)
    with TrainStream([store], spec) as stream:
        # A crop leaves tokens out, and so takes more proteins.
        assert stream.passes_of(2) < 1 < stream.passes_of(2 * total // 256)
        if crop == "chunk":
            assert stream.passes_of(10 * total // 256) == pytest.approx(10, rel=0.1)
    once = replace(SPEC, max_epochs=3, data=replace(SPEC.data, max_seq_length=128))
    with TrainStream([store], once) as stream:
        assert stream.passes_of(stream.num_packs() + 5) == 3.0
    with TrainStream([store, store], SPEC) as stream:
        assert 0 < stream.passes_of(1) < 1


def test_a_mixture_has_no_epochs(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a mixture of stores has no epochs"):
        TrainStream([store, store], replace(SPEC, max_epochs=1)).num_packs()


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (replace(SPEC, seed=2), "seed=2 differs from 1"),
        (replace(SPEC, micro_batch_tokens=512), "train.micro_batch_tokens=512 differs from 256"),
        (replace(SPEC, data=replace(SPEC.data, max_seq_length=32)), "data.max_seq_length=32 differs from 64"),
        (replace(SPEC, data=replace(SPEC.data, pack_window=50)), "data.pack_window=50 differs from 100"),
        (replace(SPEC, data=replace(SPEC.data, packing="bucket")), "data.packing=bucket differs from pack"),
        (replace(SPEC, data=replace(SPEC.data, crop="chunk")), "data.crop=chunk differs from random"),
        (replace(SPEC, max_epochs=2), "train.max_epochs=2 differs from None"),
    ],
)
def test_a_state_of_other_packs_is_refused(store: TokenStore, spec: BatchSpec, key: str) -> None:
    with TrainStream([store], SPEC) as stream:
        state = stream.state_dict()
    with pytest.raises(UserError, match=key):
        TrainStream([store], spec).load_state_dict(state)


def test_a_state_of_other_data_is_refused(store: TokenStore) -> None:
    state = TrainStream([store], SPEC).state_dict()
    state["identity"]["data.train (fingerprint)"] = ["0" * 16]
    with pytest.raises(
        UserError,
        match=r"data.train \(fingerprint\)=\['\w{16}'\] differs from \['0{16}'\] of .* set data.train back,",
    ):
        TrainStream([store], SPEC).load_state_dict(state)


def labels_of(batches: list[PackedBatch]) -> list[int]:
    return sorted(int(label) for batch in batches for label in batch.labels)


@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size", "workers"), [(1, 2, 2), (2, 2, 0), (3, 1, 0), (4, 8, 0)]
)
def test_a_step_takes_so_many_proteins_at_every_layout(
    many: TokenStore, dp_size: int, micro_batch_size: int, workers: int
) -> None:
    """Step s has the samples 24 s to 24 s + 23, masked alike, and ranks have equally many packs."""
    config = DataConfig(max_seq_length=256, workers=workers)
    spec = BatchSpec(config, 256 * micro_batch_size, seed=1, global_batch_size=24)
    whole = TrainStream([many], replace(spec, micro_batch_tokens=2048, data=replace(config, workers=0)))
    streams = [TrainStream([many], spec, rank, dp_size) for rank in range(dp_size)]
    tokens = 0
    try:
        for step in range(4):
            if step == 2:  # from a state that another number of ranks may have saved
                state = json.loads(json.dumps(streams[-1].state_dict()))
                assert state["cursor"] == {"window": 2, "offset": 0} and state["consumed_samples"] == 48
                for stream in streams:
                    stream.load_state_dict(state)
            ranks = [stream.next_step(2) for stream in streams]
            assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) % 2 == 0
            batches = [batch for batches in ranks for batch in batches]
            samples = sorted(sample for batch in batches for sample, _ in batch.samples)
            assert samples == list(range(24 * step, 24 * step + 24))
            used = [batch for batch in batches if batch.num_sequences]
            assert len(used) <= 24 / micro_batch_size
            assert all(len(batch.input_ids) == spec.micro_batch_tokens for batch in batches)
            assert all(len(batch.labels) == 0 for batch in batches if not batch.num_sequences)
            tokens += sum(batch.num_tokens for batch in batches)
        assert all(stream.state == streams[0].state for stream in streams)
        assert streams[0].state.consumed_tokens == tokens
        expected = [whole.next_step(1) for _ in range(4)][-1]
        assert labels_of(batches) == labels_of(expected)
    finally:
        for stream in [whole, *streams]:
            stream.close()


def test_steps_of_epochs_in_proteins(store: TokenStore) -> None:
    """The last step takes what is left, on every rank in equally many packs."""
    spec = BatchSpec(DataConfig(max_seq_length=64), 128, seed=1, max_epochs=2, global_batch_size=50)
    with TrainStream([store], spec, 0, 2) as first, TrainStream([store], spec, 1, 2) as second:
        assert first.num_steps(1) == 3 and first.passes_of(1) == 50 / 60
        counts = []
        for _ in range(4):
            ranks = first.next_step(1), second.next_step(1)
            assert len(ranks[0]) == len(ranks[1])
            counts.append(sum(batch.num_sequences for batches in ranks for batch in batches))
        assert counts == [50, 50, 20, 0]


def test_a_state_of_other_steps_is_refused(store: TokenStore) -> None:
    """Between numbers of proteins, sizes of their packs, and the two ways of counting."""
    tokens = BatchSpec(DataConfig(max_seq_length=64), 128, seed=1)
    proteins = replace(tokens, global_batch_size=12)
    for saved, now, message in (
        (proteins, replace(proteins, global_batch_size=24), "train.global_batch_size=24 differs from 12"),
        (proteins, replace(proteins, micro_batch_tokens=256), "train.micro_batch_size=4 differs from 2"),
        (
            proteins,
            tokens,
            "train.micro_batch_tokens=128 counts batches in tokens, the checkpoint in proteins, .* give "
            "train.micro_batch_size=2 train.global_batch_size=12 as before, or start a new run",
        ),
        (
            tokens,
            proteins,
            "train.global_batch_size=12 counts batches in proteins, the checkpoint in tokens, .* give "
            "train.micro_batch_tokens=128 and train.global_batch_tokens as before, or start a new run",
        ),
    ):
        state = TrainStream([store], saved).state_dict()
        with pytest.raises(UserError, match=message):
            TrainStream([store], now).load_state_dict(state)
    old = TrainStream([store], tokens).state_dict()
    del old["identity"]["train.global_batch_size"]
    TrainStream([store], tokens).load_state_dict(old)
    with pytest.raises(UserError, match="the checkpoint in tokens"):
        TrainStream([store], proteins).load_state_dict(old)


def test_errors_of_the_thread_reach_the_caller(store: TokenStore) -> None:
    broken = TokenStore(store.path)
    broken.starts = np.zeros(0, dtype=np.int64)
    stream = TrainStream([broken], SPEC)
    with pytest.raises(IndexError):
        next(stream)
    stream.close()


def test_a_pack_too_small_for_the_longest_protein_is_refused(store: TokenStore) -> None:
    with pytest.raises(UserError, match="train.micro_batch_tokens=63 is smaller than data.max_seq_length=64"):
        TrainStream([store], replace(SPEC, micro_batch_tokens=63))


def test_evaluation_reads_every_protein_once_and_the_same_each_time(store: TokenStore) -> None:
    packs = EvalPacks(store, replace(SPEC, data=replace(SPEC.data, max_seq_length=128)), MASKS)
    first, second = ([digest(batch) for batch in packs] for _ in range(2))
    assert first == second and len(first) == len(packs) == packs.num_packs
    proteins = [f"<cls>{vocabulary.decode(store.residues(i))}<eos>" for i in range(60)]
    assert sorted(text for batch in packs for text in originals(batch)) == sorted(proteins)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("limit", [0, 5])
def test_evaluation_is_dealt_evenly(store: TokenStore, dp_size: int, limit: int) -> None:
    expected = [digest(batch) for batch in EvalPacks(store, SPEC, MASKS, limit)]
    assert len(expected) == (limit or EvalPacks(store, SPEC, MASKS).num_packs)
    ranks = [EvalPacks(store, SPEC, MASKS, limit, rank, dp_size) for rank in range(dp_size)]
    batches = [list(packs) for packs in ranks]
    assert {len(part) for part in batches} == {len(ranks[0])} == {-(-len(expected) // dp_size)}
    dealt = [batch for step in zip(*batches, strict=True) for batch in step]
    assert [digest(batch) for batch in dealt[: len(expected)]] == expected
    for batch in dealt[len(expected) :]:
        assert batch.input_ids.tolist() == [vocabulary.PAD] * 256
        assert batch.seqlens == [256] and batch.cu_seqlens.tolist() == [0, 256]
        assert len(batch.labels) == batch.num_tokens == batch.num_residues == batch.num_sequences == 0


def test_training_and_evaluation_masks_differ(store: TokenStore) -> None:
    spec = BatchSpec(DataConfig(max_seq_length=128), micro_batch_tokens=128, seed=1)
    training = build_batch([store], spec, make_pack([59], [59], [121]))
    evaluation = next(batch for batch in EvalPacks(store, spec, MASKS) if 121 in batch.seqlens)
    index = evaluation.seqlens.index(121)
    assert originals(evaluation)[index] == originals(training)[0]
    masked = evaluation.input_ids.split(evaluation.seqlens)[index]
    assert masked.tolist() != training.input_ids[:121].tolist()


def test_the_loader_is_faster_than_any_model(real_store: TokenStore) -> None:
    spec = BatchSpec(DataConfig(), micro_batch_tokens=4096, seed=1)
    with TrainStream([real_store], spec) as stream:
        next(stream)
        began = time.process_time()
        tokens = sum(batch.num_tokens for batch in itertools.islice(stream, 200))
        rate = tokens / (time.process_time() - began)
    assert rate > 1e6  # measured: 7 M tokens/s of CPU time; the bound leaves room for slower machines
