"""Builds the arrays of one micro-batch from a planned pack: reads, crops, masks and pads, without torch.

Crop and masks of a training sample depend on its number and the seed, not on the pack that it is in; those of
evaluation are in `recipe.py`. Processes that build batches (`data.workers`) import this module alone, and so
start in a fraction of a second.

    T   tokens of a pack, padding included: `train.micro_batch_tokens`, or `BatchSpec.capacity`
    n   segments of a pack: its pieces of proteins, and the padding between and behind them
    M   tokens to predict
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.config.model import tail_multiple
from esm2mega.config.schema import DataConfig, Run
from esm2mega.data.counter_rng import Integers
from esm2mega.data.store.limit import limited
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.balance import share_out
from esm2mega.data.stream.masking import mask_tokens
from esm2mega.data.stream.packing import EMPTY_WINDOW, Pack, PackCursor, PackPlan, PackShape, PackWindow
from esm2mega.data.stream.samples import Pieces, Proteins, TrainSamples


@dataclass(frozen=True)
class BatchSpec:
    """Holds what decides the content of all batches, besides the stores.

    Attributes:
        data: sampling, cropping, masking and packing.
        micro_batch_tokens: tokens of a pack, T.
        seed: seed of the run.
        max_epochs: number of times to take every protein (or cluster) before training ends; None for no end.
        skipped: numbers of training packs that are replaced by padding, in the order of all packs from 0.
        global_batch_size: samples that a step takes, which are then packed together; None where a step takes
            a number of packs.
        tail_multiple: a pack with room left ends at the first multiple of so many tokens behind its last
            protein, or at T; None where every pack has T tokens.
    """

    data: DataConfig
    micro_batch_tokens: int
    seed: int
    max_epochs: int | None = None
    skipped: frozenset[int] = frozenset()
    global_batch_size: int | None = None
    tail_multiple: int | None = None

    @classmethod
    def of_training(cls, run: Run) -> BatchSpec:
        """Return what decides the batches that a run trains on."""
        train = run.train
        total = train.global_batch_size
        return cls(
            *(run.data, train.micro_batch_tokens, run.seed, train.max_epochs),
            global_batch_size=total,
            # Where a step takes a number of packs, they are full.
            tail_multiple=None if total is None else tail_multiple(run.model, run.parallel),
        )

    def capacity(self, pack: Pack) -> int:
        """Return the number of tokens of a pack with its padding, at least 1 and at most T."""
        if self._tail_multiple is None:
            return self.micro_batch_tokens
        filled = -(-max(pack.num_tokens, 1) // self._tail_multiple) * self._tail_multiple
        return min(filled, self.micro_batch_tokens)

    @property
    def _tail_multiple(self) -> int | None:
        """Return `tail_multiple`; None for padded batches, which all have T tokens."""
        return self.tail_multiple if self.data.packing == "pack" else None

    def pack_shape(self) -> PackShape:
        """Return the part of the specification that decides which samples share a pack."""
        window = self.global_batch_size or self.data.pack_window
        return PackShape(
            self.micro_batch_tokens,
            self.data.max_seq_length,
            window,
            self.data.packing,
            has_whole_tails=self._tail_multiple is None,
        )


@dataclass(frozen=True)
class BatchArrays:
    """Holds one micro-batch in types that are small enough to travel between processes.

    Attributes:
        input_ids: token ids after masking, `<pad>` where there is no protein, uint8 [T].
        cu_seqlens: where each segment begins, and T at the end, int32 [n + 1].
        label_positions: positions of the tokens to predict, ascending, int32 [M].
        labels: the original tokens there, uint8 [M].
        num_tokens: tokens of proteins, `<cls>` and `<eos>` included, padding not.
        num_residues: tokens of proteins without `<cls>` and `<eos>`.
        num_sequences: proteins, or pieces of them.
        samples: number of the sample and of the first token of each.
        starts: where each begins in the pack.
        pack: number of the pack in the order of all packs; -1 for padding, and in evaluation.
    """

    input_ids: npt.NDArray[np.uint8]
    cu_seqlens: npt.NDArray[np.int32]
    label_positions: npt.NDArray[np.int32]
    labels: npt.NDArray[np.uint8]
    num_tokens: int
    num_residues: int
    num_sequences: int
    samples: list[tuple[int, int]]
    starts: list[int]
    pack: int = -1


_COUNTED_SAMPLES = 16384

# This pack holds padding only, for ranks that have nothing left to do.
PADDING = Pack(PackWindow(EMPTY_WINDOW.pieces, EMPTY_WINDOW.offsets, [0, 0], [0], [0]), 0)


def build_arrays(
    stores: Sequence[Proteins], spec: BatchSpec, pack: Pack, streams: Integers | None = None
) -> BatchArrays:
    """Read, mask and lay out one pack.

    Args:
        stores: Proteins that the pack names.
        spec: Content of the batches.
        pack: The pack.
        streams: Random stream that masks each piece, [n]; None for the one with its sample number.
    """
    pieces, capacity = pack.pieces, spec.capacity(pack)
    streams = pieces.samples if streams is None else streams
    tokens = piece_tokens(stores, pieces)
    # The chunks of a protein share a stream of random numbers; any other piece has its own.
    starts = pieces.starts if spec.data.crop == "chunk" else None
    masked = mask_tokens(tokens, streams, pieces.lengths, spec.seed, spec.data, starts)

    packed = np.cumsum(pieces.lengths) - pieces.lengths  # where each piece begins in `tokens`
    places = np.arange(len(tokens)) + np.repeat(pack.offsets - packed, pieces.lengths)
    input_ids = np.full(capacity, vocabulary.PAD, dtype=np.uint8)
    input_ids[places] = masked.input_ids
    borders = np.concatenate([[0, capacity], pack.offsets, pack.offsets + pieces.lengths])
    return BatchArrays(
        input_ids=input_ids,
        cu_seqlens=np.unique(borders).astype(np.int32),
        label_positions=places[masked.label_positions].astype(np.int32),
        labels=masked.labels.astype(np.uint8),
        num_tokens=len(tokens),
        num_residues=int(np.count_nonzero((tokens != vocabulary.CLS) & (tokens != vocabulary.EOS))),
        num_sequences=len(pieces),
        samples=pieces.sample_starts(),
        starts=pack.offsets.tolist(),
    )


def token_counts(samples: TrainSamples) -> npt.NDArray[np.int64]:
    """Count how often each residue token occurs in the training data, [33].

    For one store without clusters these are the counts of the store. For clusters and mixtures they come from
    the first 16,384 samples: some 5 million residues, whose frequencies are as good as those of all.
    """
    if samples.takes_all and isinstance(store := samples.stores[0], TokenStore):
        return store.token_counts
    tokens = piece_tokens(samples.stores, samples(np.arange(_COUNTED_SAMPLES)))
    counts = np.bincount(tokens, minlength=len(vocabulary.VOCAB))
    counts[[vocabulary.CLS, vocabulary.EOS]] = 0
    return counts


def piece_tokens(stores: Sequence[Proteins], pieces: Pieces) -> npt.NDArray[np.uint8]:
    """Return the tokens of pieces back to back, cut out of `<cls>` residues `<eos>`, [sum of lengths]."""
    tokens = np.empty(int(pieces.lengths.sum()), dtype=np.uint8)
    first = 0
    for store, row, start, length in zip(
        pieces.stores.tolist(),
        pieces.rows.tolist(),
        pieces.starts.tolist(),
        pieces.lengths.tolist(),
        strict=True,
    ):
        residues = stores[store].residues(row)
        piece = tokens[first : first + length]
        # Token 0 of a protein is <cls>, so residue i is token i + 1 and token len(residues) + 1 is <eos>.
        has_cls, has_eos = start == 0, start + length == len(residues) + 2
        piece[has_cls : length - has_eos] = residues[start - 1 + has_cls : start - 1 + length - has_eos]
        if has_cls:
            piece[0] = vocabulary.CLS
        if has_eos:
            piece[-1] = vocabulary.EOS
        first += length
    # While the tokens are used, they may still be compared with their checksum in the background.
    if len(tokens) and tokens.max() >= len(vocabulary.VOCAB):
        _raise_wrong_token(stores, pieces)
    return tokens


def _raise_wrong_token(stores: Sequence[Proteins], pieces: Pieces) -> None:
    for number, row in zip(pieces.stores.tolist(), pieces.rows.tolist(), strict=True):
        store = stores[number]
        if isinstance(store, TokenStore) and (error := store.wrong_token(row)) is not None:
            raise error


@dataclass(frozen=True)
class StreamState:
    """Says how much of the training data all data-parallel ranks together have consumed.

    Attributes:
        cursor: the next pack.
        consumed_packs: packs before the next one.
        consumed_samples: proteins, or pieces of them, in these packs.
        consumed_tokens: tokens in these packs, without padding.
    """

    cursor: PackCursor = PackCursor()
    consumed_packs: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, packs: Sequence[Pack], cursor: PackCursor) -> StreamState:
        """Return the state when `packs` are consumed as well and `cursor` comes next."""
        return StreamState(
            cursor,
            self.consumed_packs + len(packs),
            self.consumed_samples + sum(pack.num_pieces for pack in packs),
            self.consumed_tokens + sum(pack.num_tokens for pack in packs),
        )


@dataclass(frozen=True)
class Share:
    """Says which batches are built here: those of one data-parallel rank, or of a worker of that rank.

    Attributes:
        dp_rank: data-parallel rank of this process.
        dp_size: number of data-parallel ranks.
        worker: number of this worker among those of the rank.
        workers: number of workers of the rank, which take turns.
        micro_batches: packs that each rank takes in a step; where a step takes a number of samples, the packs
            of these are divided instead.
    """

    dp_rank: int = 0
    dp_size: int = 1
    worker: int = 0
    workers: int = 1
    micro_batches: int = 1


class Dealt(NamedTuple):
    """Holds a pack that was dealt to a rank.

    Attributes:
        number: its number in the order of all packs; -1 for a rank for which none was left.
        pack: the pack, or padding.
        behind: the state when every rank has taken as many packs. Until the step ends it counts them, and
            says nothing about which they were.
    """

    number: int
    pack: Pack
    behind: StreamState


def train_plan(samples: TrainSamples, spec: BatchSpec) -> PackPlan:
    """Plan the sequence of packs of a training run."""
    num_samples = None
    if spec.max_epochs is not None:
        if samples.epoch_size is None:
            raise ValueError("a mixture of stores has no epochs")
        num_samples = spec.max_epochs * samples.epoch_size
    return PackPlan(samples, spec.seed, spec.pack_shape(), num_samples)


def deal(samples: TrainSamples, spec: BatchSpec, share: Share, state: StreamState) -> Iterator[Dealt]:
    """Yield the packs of `share` behind `state`, where a step must begin.

    The packs of a step are consecutive, and `share_out` divides them among the ranks. Where a step takes a
    number of samples, these are a window. Ranks for which no pack is left in the last round of a step get
    padding, as all do behind the end of the data.
    """
    plan = train_plan(samples, spec)
    while True:
        count = share.dp_size * share.micro_batches
        if spec.global_batch_size is not None:
            count = len(plan.window(state.cursor.window)) - state.cursor.offset
        packs, _ = plan.take(state.cursor, count)
        mine = share_out([pack.cost for pack in packs], share.dp_size)[share.dp_rank]
        first = state.consumed_packs
        for done in range(0, max(len(packs), 1), share.dp_size):
            taken, cursor = plan.take(state.cursor, min(share.dp_size, len(packs) - done))
            state = state.after(taken, cursor)
            if not mine:
                yield Dealt(-1, PADDING, state)
                continue
            place = mine.pop(0)
            number = first + place
            yield Dealt(number, PADDING if number in spec.skipped else packs[place], state)


def train_batches(
    samples: TrainSamples, spec: BatchSpec, share: Share, state: StreamState
) -> Iterator[tuple[BatchArrays, StreamState]]:
    """Yield the batches of the packs that `deal` deals; of a worker, those whose turn it is."""
    for turn, (number, pack, behind) in enumerate(deal(samples, spec, share, state)):
        if turn % share.workers == share.worker:
            yield replace(build_arrays(samples.stores, spec, pack), pack=number), behind


def worker_batches(
    paths: Sequence[Path], spec: BatchSpec, share: Share, state: StreamState, worker: int
) -> Iterator[tuple[BatchArrays, StreamState]]:
    """Run `train_batches` for one worker of a share, in a process that has not opened the stores yet."""
    samples = TrainSamples([limited(TokenStore(path), spec.data) for path in paths], spec.data, spec.seed)
    return train_batches(samples, spec, replace(share, worker=worker), state)
