"""Serves packed, masked batches: an endless stream for training, a fixed list for evaluation.

The packs of a step are those that come next in the order of all packs, so the packs between two optimizer
steps are the same for every dp_size and every number of micro-batches; `balance` divides them among ranks.
Ranks of one tensor-, pipeline- or context-parallel group use the same dp_rank and build the same batches.

    T   tokens of a pack, padding included: `train.micro_batch_tokens`, or `BatchSpec.capacity`
    n   segments of a pack: its pieces of proteins, and each stretch of `<pad>` between or behind them
    M   tokens to predict
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from esm2mega.batch import PackedBatch
from esm2mega.config.schema import EvalConfig
from esm2mega.data import counter_rng
from esm2mega.data.counter_rng import Integers
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import (
    PADDING,
    BatchArrays,
    BatchSpec,
    Share,
    StreamState,
    build_arrays,
    train_batches,
    train_plan,
    worker_batches,
)
from esm2mega.data.stream.packing import Pack, PackCursor, PackPlan
from esm2mega.data.stream.prefetch import Prefetcher, ProcessPrefetcher
from esm2mega.data.stream.recipe import masked_as, protein_streams
from esm2mega.data.stream.samples import EvalSamples, Proteins, TrainSamples
from esm2mega.data.stream.step_batches import StepBatches
from esm2mega.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

_TOTAL = "train.global_batch_size"
"""This key is None where batches are counted in tokens."""


def build_batch(
    stores: Sequence[TokenStore], spec: BatchSpec, pack: Pack, streams: Integers | None = None
) -> PackedBatch:
    """Read, crop, mask and pad one pack; the arguments are those of `build_arrays`."""
    return _as_tensors(build_arrays(stores, spec, pack, streams))


def _as_tensors(arrays: BatchArrays) -> PackedBatch:
    """Return the batch as tensors of the types that the model needs."""
    seqlens = np.diff(arrays.cu_seqlens).tolist()
    batch = PackedBatch(
        input_ids=torch.from_numpy(arrays.input_ids.astype(np.int64)),
        cu_seqlens=torch.from_numpy(arrays.cu_seqlens),
        seqlens=seqlens,
        max_seqlen=max(seqlens),
        label_positions=torch.from_numpy(arrays.label_positions.astype(np.int64)),
        labels=torch.from_numpy(arrays.labels.astype(np.int64)),
        label_counts=np.diff(np.searchsorted(arrays.label_positions, arrays.cu_seqlens)).tolist(),
        num_tokens=arrays.num_tokens,
        num_residues=arrays.num_residues,
        num_sequences=arrays.num_sequences,
        samples=arrays.samples,
        starts=arrays.starts,
        pack=arrays.pack,
    )
    return batch.packed_up() if torch.cuda.is_available() else batch


def _with_tensors(built: tuple[BatchArrays, StreamState]) -> tuple[PackedBatch, StreamState]:
    arrays, behind = built
    return _as_tensors(arrays), behind


BatchT = TypeVar("BatchT")


class PackStream(ABC, Generic[BatchT]):
    """Iterates over this rank's training batches, which are built ahead; close it after use.

    The state covers the batches that were taken, not those built ahead. Behind a step it is valid for any
    `dp_size`, and the same on all ranks; within a step it only counts. With `max_epochs` the data end, and
    batches of padding without labels follow. Batches that are not taken by `next_step` are steps of one.
    """

    def __init__(self, samples: TrainSamples, spec: BatchSpec, share: Share) -> None:
        """Start at the first pack.

        Args:
            samples: samples to train on.
            spec: content of the batches.
            share: which of the packs are those of this rank.
        """
        self.samples = samples
        self._spec = spec
        self._shape = spec.pack_shape()
        self._share = share
        self._state = StreamState()
        self._ahead: Prefetcher[tuple[BatchT, StreamState]] | None = None

    @abstractmethod
    def _start(self) -> Prefetcher[tuple[BatchT, StreamState]]:
        """Start building ahead from the state on: pairs of a batch and the state behind it."""

    @abstractmethod
    def _padding(self) -> BatchT:
        """Build a batch of padding without labels."""

    def next_step(self, micro_batches: int) -> Sequence[BatchT]:
        """Return this rank's batches of the next step, on every rank equally many.

        Where a step takes a number of packs, each is taken from the stream when it is first asked for, so
        that the first one runs while others are built.

        Args:
            micro_batches: Their number. Where a step takes a number of samples, what it is filled up to a
                multiple of, with batches of padding.
        """
        if micro_batches != self._share.micro_batches:
            self.close()
            self._share = replace(self._share, micro_batches=micro_batches)
        if self._spec.global_batch_size is None:
            return StepBatches(self, micro_batches)
        batches = [next(self)]
        while self._state.cursor.offset:
            batches.append(next(self))
        return batches + [self._padding() for _ in range(-len(batches) % micro_batches)]

    @property
    def _num_ahead(self) -> int:
        """Return how many batches are built ahead: a whole step, so that the host can launch it at once."""
        return self._share.micro_batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BatchT:
        if self._ahead is None:
            self._ahead = self._start()
        batch, self._state = next(self._ahead)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop building ahead; the state stays readable, and taking another batch starts again behind it."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def num_packs(self) -> int:
        """Count the packs of `max_epochs` by planning them all, in a second per million proteins at most."""
        return sum(len(window) for window in train_plan(self.samples, self._spec).windows())

    def num_steps(self, packs_per_step: int) -> int:
        """Count the steps of `max_epochs`, of which the last one may be smaller.

        Args:
            packs_per_step: Packs of a step, unless it takes a number of samples.
        """
        if (size := self._spec.global_batch_size) is None:
            return -(-self.num_packs() // packs_per_step)
        num_samples = train_plan(self.samples, self._spec).num_samples
        assert num_samples is not None
        return -(-num_samples // size)

    def passes_of(self, num_packs: int) -> float:
        """Return how often a step holds each protein (or cluster) of the data, on average.

        Args:
            num_packs: Packs of a step, unless it takes a number of samples.
        """
        if self._spec.global_batch_size is not None:
            return self._spec.global_batch_size / self.samples.size
        packs, _ = train_plan(self.samples, self._spec).take(PackCursor(), num_packs)
        samples = np.concatenate([pack.pieces.samples for pack in packs])
        # All chunks of a protein have the same sample number.
        return len(np.unique(samples)) / self.samples.size

    def skip(self, packs: Iterable[int]) -> None:
        """Replace packs by padding from here on; they count as consumed all the same.

        Args:
            packs: Their numbers in the order of all packs, from 0.
        """
        self.close()
        self._spec = replace(self._spec, skipped=self._spec.skipped | frozenset(packs))

    def contents_of(self, behind: StreamState, packs: Iterable[int]) -> list[dict[str, Any]]:
        """Return what packs hold that lie behind a state, as plain JSON values.

        Args:
            behind: A state of this stream.
            packs: Numbers of packs in the order of all packs; those behind the end of the data are left out.

        Returns:
            For each pack ``pack``, its number; ``proteins``, the ids of its proteins, or of those that it has
            pieces of; and ``samples``, the number of the sample and of the first token of each piece.
        """
        wanted = sorted(packs)
        count = wanted[-1] + 1 - behind.consumed_packs if wanted else 0
        planned, _ = train_plan(self.samples, self._spec).take(behind.cursor, count)
        pieces = {n: pack.pieces for n, pack in enumerate(planned, behind.consumed_packs)}
        return [
            {
                "pack": n,
                "proteins": self.samples.names(pieces[n]),
                "samples": [list(piece) for piece in pieces[n].sample_starts()],
            }
            for n in wanted
            if n in pieces
        ]

    @property
    def state(self) -> StreamState:
        """Return how much of the data was consumed."""
        return self._state

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values, with what it depends on."""
        return {
            "cursor": self._state.cursor.to_dict(),
            "consumed_packs": self._state.consumed_packs,
            "consumed_samples": self._state.consumed_samples,
            "consumed_tokens": self._state.consumed_tokens,
            "identity": self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind a saved state, which may have been saved with another `dp_size`.

        Raises:
            UserError: The state belongs to other data or other packs, for which its cursor has no meaning.
        """
        now, before = self._identity(), state["identity"]
        if (now[_TOTAL] is None) != (before.get(_TOTAL) is None):
            raise _other_way(before, now)
        for key, value in now.items():
            saved = before.get(key)
            if saved != value:
                raise UserError(
                    f"{key}={value} differs from {saved} of the checkpoint, which changes the order of the "
                    f"data: set {key.partition(' ')[0]} back, or start a new run from the weights with "
                    "init_from"
                )
        self.close()
        self._state = StreamState(
            PackCursor.from_dict(state["cursor"]),
            int(state["consumed_packs"]),
            int(state["consumed_samples"]),
            int(state["consumed_tokens"]),
        )

    def _identity(self) -> dict[str, Any]:
        """Return all that the meaning of a cursor depends on, under the names of the configuration."""
        tokens, total = self._shape.micro_batch_tokens, self._spec.global_batch_size
        # `data.max_seq_length`, which T is a multiple of where batches are counted in proteins, is in there.
        counted = {"train.micro_batch_tokens": tokens}
        if total is not None:
            counted = {"train.micro_batch_size": tokens // self._shape.max_seq_length}
        return {
            **self.samples.identity(),
            _TOTAL: total,
            **counted,
            "train.max_epochs": self._spec.max_epochs,
            "data.packing": self._shape.packing,
            "data.pack_window": self._shape.window,
        }


def _other_way(before: Mapping[str, Any], now: Mapping[str, Any]) -> UserError:
    """Return the error of a run that counts batches in proteins and its checkpoint in tokens, or reversed."""
    size, tokens = "train.micro_batch_size", "train.micro_batch_tokens"
    if now[_TOTAL] is None:
        given, ways = f"{tokens}={now[tokens]}", ("tokens", "proteins")
        cure = f"{size}={before[size]} {_TOTAL}={before[_TOTAL]}"
    else:
        given, ways = f"{_TOTAL}={now[_TOTAL]}", ("proteins", "tokens")
        cure = f"{tokens}={before[tokens]} and train.global_batch_tokens"
    return UserError(
        f"{given} counts batches in {ways[0]}, the checkpoint in {ways[1]}, which changes the order of the "
        f"data: give {cure} as before, or start a new run from the weights with init_from"
    )


class TrainStream(PackStream[PackedBatch]):
    """Iterates without end over masked batches of token stores; close it after use.

    Batches are built ahead, one in a thread or some in each of `data.workers` processes, with equal results.
    """

    def __init__(
        self, stores: Sequence[TokenStore], spec: BatchSpec, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Start at the first pack.

        Args:
            stores: training proteins; several stores are mixed by `data.weights`.
            spec: content of the batches.
            dp_rank: data-parallel rank of this process.
            dp_size: number of data-parallel ranks.
        """
        share = Share(dp_rank, dp_size, workers=max(1, spec.data.workers))
        super().__init__(TrainSamples(stores, spec.data, spec.seed), spec, share)

    def _start(self) -> Prefetcher[tuple[PackedBatch, StreamState]]:
        # Tensors are made, and for a GPU pinned, in a thread of this process, wherever the arrays come from.
        if not (workers := self._spec.data.workers):
            arrays = train_batches(self.samples, self._spec, self._share, self._state)
            return Prefetcher(map(_with_tensors, arrays), self._num_ahead)
        paths = [store.path for store in self.samples.stores]
        batches = functools.partial(worker_batches, paths, self._spec, self._share, self._state)
        processes = ProcessPrefetcher(batches, workers)
        return Prefetcher(map(_with_tensors, processes), self._num_ahead, processes.close)

    def _padding(self) -> PackedBatch:
        return _as_tensors(build_arrays(self.samples.stores, self._spec, PADDING))


class SplitPacks(ABC, Generic[BatchT]):
    """Serves a split for evaluation: every protein once, the same in every iteration.

    Crops follow from the seed and the number of the protein in the store, so the loss of a whole split does
    not depend on packs and ranks. Packs come in a fixed random order, so that a limit takes a random
    sample. When the packs cannot be divided evenly among the ranks, some ranks end with a batch of padding
    without labels: all ranks run equally many micro-batches.
    """

    def __init__(
        self, store: Proteins, spec: BatchSpec, limit: int = 0, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Select this rank's batches.

        Args:
            store: proteins of the split.
            spec: content of the batches.
            limit: largest number of packs over all ranks; 0 for the whole split.
            dp_rank: data-parallel rank of this process.
            dp_size: number of data-parallel ranks.
        """
        # Another seed keeps validation from repeating the random numbers of training.
        self._spec = replace(spec, seed=counter_rng.derive_seed(spec.seed, counter_rng.Purpose.EVALUATION))
        self._limit = limit or None
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        samples = EvalSamples(store, self._spec.data, self._spec.seed)
        self._plan = PackPlan(samples, self._spec.seed, spec.pack_shape(), num_samples=len(store))

    @functools.cached_property
    def num_packs(self) -> int:
        """Return the number of packs over all ranks, without those of padding only."""
        if self._limit is None:
            return int(self._borders[-1])
        return sum(1 for _ in self._packs())

    def __len__(self) -> int:
        """Return the number of micro-batches of each rank."""
        return -(-self.num_packs // self._dp_size)

    def __iter__(self) -> Iterator[BatchT]:
        packs = self._packs()
        while dealt := list(itertools.islice(packs, self._dp_size)):
            pack = dealt[self._dp_rank] if self._dp_rank < len(dealt) else PADDING
            yield self._build(pack)

    def batch(self, number: int) -> BatchT:
        """Return the batch of one pack, by its number over all ranks from 0."""
        window = int(np.searchsorted(self._borders, number, side="right")) - 1
        return self._build(Pack(self._plan.window(window), number - int(self._borders[window])))

    @functools.cached_property
    def _borders(self) -> npt.NDArray[np.int64]:
        """Return the number of the first pack of each window of the plan, and the total number of packs."""
        return np.cumsum([0, *map(len, self._plan.windows())])

    @abstractmethod
    def _build(self, pack: Pack) -> BatchT:
        """Build the batch of one pack."""

    def _packs(self) -> Iterator[Pack]:
        """Iterate over the packs of all ranks."""
        packs = (Pack(window, i) for window in self._plan.windows() for i in range(len(window)))
        return itertools.islice(packs, self._limit)


class EvalPacks(SplitPacks[PackedBatch]):
    """Serves masked batches of a split in a token store, by the recipe of evaluation; see `SplitPacks`."""

    def __init__(
        self,
        store: TokenStore,
        spec: BatchSpec,
        masks: EvalConfig,
        limit: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Select this rank's batches.

        Args:
            store: As for `SplitPacks`, like the arguments behind `masks`.
            spec: Lengths and packs; its masks, crops and seed are those of training and do not count here.
            masks: The recipe, see `esm2mega.data.stream.recipe`.
            limit: Largest number of packs over all ranks.
            dp_rank: Data-parallel rank.
            dp_size: Number of ranks.
        """
        pinned = replace(spec, data=masked_as(spec.data, masks), seed=masks.seed)
        super().__init__(store, pinned, limit, dp_rank, dp_size)
        self._store = store

    def _build(self, pack: Pack) -> PackedBatch:
        streams = protein_streams([self._store], pack.pieces)
        batch = build_batch([self._store], self._spec, pack, streams)
        starts = batch.cu_seqlens[:-1].numpy()
        rows = np.full(len(starts), -1)
        rows[np.searchsorted(starts, pack.offsets)] = pack.pieces.rows
        return replace(batch, rows=rows.tolist())
