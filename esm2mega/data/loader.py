"""Packed, masked batches from a token store: an endless stream for training, a fixed list for evaluation.

Micro-batch m of data-parallel rank r is pack m * dp_size + r behind the point where the stream was started,
so the packs between two optimizer steps are the same ones for every dp_size and every number of
micro-batches. Ranks of one tensor- or pipeline-parallel group use the same dp_rank and build the same
batches.

    T   tokens of a pack (`train.micro_batch_tokens`), padding included
    n   segments of a pack: its proteins and, when it is not full, one segment of `<pad>` at the end
    M   tokens to predict
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esm2mega.config.schema import DataConfig
from esm2mega.data import sampling, tokenizer
from esm2mega.data.masking import mask_tokens
from esm2mega.data.packing import Pack, PackCursor, PackPlan, PackShape
from esm2mega.data.prefetch import Prefetcher
from esm2mega.data.store import TokenStore
from esm2mega.errors import UserError

_NO_SAMPLES = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class BatchSpec:
    """What decides the content of all batches, besides the store.

    Attributes:
        data: cropping, masking and packing.
        micro_batch_tokens: tokens of a pack, T.
        seed: seed of the run.
    """

    data: DataConfig
    micro_batch_tokens: int
    seed: int

    def pack_shape(self) -> PackShape:
        """The part of it that decides which samples share a pack."""
        return PackShape(self.micro_batch_tokens, self.data.max_seq_length, self.data.pack_window)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: a pack of proteins, one behind the other, with its labels.

    Attributes:
        input_ids: token ids after masking, `<pad>` behind the last protein, int64 [T].
        cu_seqlens: where each segment begins, and T at the end, int32 [n + 1].
        seqlens: tokens of each segment on the host, n numbers that add up to T.
        max_seqlen: the largest of `seqlens`.
        label_positions: places of the tokens to predict, ascending, int64 [M].
        labels: the original tokens there, int64 [M].
        num_tokens: tokens of proteins, `<cls>` and `<eos>` included, padding not.
        num_residues: the same without `<cls>` and `<eos>`.
        num_sequences: proteins in the pack.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens: list[int]
    max_seqlen: int
    label_positions: torch.Tensor
    labels: torch.Tensor
    num_tokens: int
    num_residues: int
    num_sequences: int

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`; the host numbers stay on the host."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            label_positions=self.label_positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


def build_batch(store: TokenStore, spec: BatchSpec, pack: Pack) -> PackedBatch:
    """Reads, crops, masks and pads one pack; what becomes of a sample depends on its number and the seed."""
    capacity = spec.micro_batch_tokens
    tokens = _read_windows(store, spec, pack)
    masked = mask_tokens(tokens, pack.samples, pack.lengths, spec.seed, spec.data)

    input_ids = np.full(capacity, tokenizer.PAD, dtype=np.int64)
    input_ids[: len(tokens)] = masked.input_ids
    seqlens = pack.lengths.tolist()
    if len(tokens) < capacity:
        seqlens.append(capacity - len(tokens))
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(seqlens)], dtype=torch.int32),
        seqlens=seqlens,
        max_seqlen=max(seqlens),
        label_positions=torch.from_numpy(masked.label_positions),
        labels=torch.from_numpy(masked.labels),
        num_tokens=len(tokens),
        num_residues=int(np.count_nonzero((tokens != tokenizer.CLS) & (tokens != tokenizer.EOS))),
        num_sequences=len(pack.samples),
    )


def _read_windows(store: TokenStore, spec: BatchSpec, pack: Pack) -> npt.NDArray[np.uint8]:
    """The cropped proteins of a pack back to back, windows of `<cls>` residues `<eos>`, [num_tokens]."""
    whole = store.lengths[pack.sequences].astype(np.int64) + 2
    starts = sampling.crop_starts(spec.seed, pack.samples, whole, spec.data.max_seq_length, spec.data.crop)
    tokens = np.empty(pack.num_tokens, dtype=np.uint8)
    first = 0
    for sequence, start, length in zip(
        pack.sequences.tolist(), starts.tolist(), pack.lengths.tolist(), strict=True
    ):
        residues = store.residues(sequence)
        window = tokens[first : first + length]
        # Token 0 of a protein is <cls>, so residue i is token i + 1 and token len(residues) + 1 is <eos>.
        has_cls, has_eos = start == 0, start + length == len(residues) + 2
        window[has_cls : length - has_eos] = residues[start - 1 + has_cls : start - 1 + length - has_eos]
        if has_cls:
            window[0] = tokenizer.CLS
        if has_eos:
            window[-1] = tokenizer.EOS
        first += length
    return tokens


@dataclass(frozen=True)
class StreamState:
    """How far the training data were consumed, by all data-parallel ranks together.

    Attributes:
        cursor: the next pack.
        consumed_packs: packs up to there.
        consumed_samples: proteins in them.
        consumed_tokens: tokens in them without padding.
    """

    cursor: PackCursor = PackCursor()
    consumed_packs: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, packs: Sequence[Pack], cursor: PackCursor) -> StreamState:
        """The state when `packs` are consumed as well and `cursor` comes next."""
        return StreamState(
            cursor,
            self.consumed_packs + len(packs),
            self.consumed_samples + sum(len(pack.samples) for pack in packs),
            self.consumed_tokens + sum(pack.num_tokens for pack in packs),
        )


class TrainStream:
    """Endless iterator over this rank's training batches, built one ahead in a thread; close it after use.

    Its state covers the batches that were taken, not the one prepared ahead, and holds for any `dp_size`:
    it is the same on all ranks after they took equally many batches.
    """

    def __init__(self, store: TokenStore, spec: BatchSpec, dp_rank: int = 0, dp_size: int = 1) -> None:
        """Starts at the first pack.

        Args:
            store: training proteins.
            spec: content of the batches.
            dp_rank: data-parallel rank of this process.
            dp_size: number of data-parallel ranks.
        """
        self._store = store
        self._spec = spec
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._plan = PackPlan(store.lengths, spec.seed, spec.pack_shape())
        self._state = StreamState()
        self._ahead: Prefetcher[tuple[PackedBatch, StreamState]] | None = None

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> PackedBatch:
        if self._ahead is None:
            self._ahead = Prefetcher(self._batches(self._state))
        batch, self._state = next(self._ahead)
        return batch

    def __enter__(self) -> TrainStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops building ahead. The state stays readable, and taking another batch starts again behind it."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    @property
    def state(self) -> StreamState:
        """How far the data were consumed."""
        return self._state

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values, with what it depends on."""
        return {
            "cursor": self._state.cursor.to_dict(),
            "consumed_packs": self._state.consumed_packs,
            "consumed_samples": self._state.consumed_samples,
            "consumed_tokens": self._state.consumed_tokens,
            "identity": self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues behind a saved state, also one that was saved with another `dp_size`.

        Raises:
            UserError: the state belongs to other data or other packs, in which its place means nothing.
        """
        for key, value in self._identity().items():
            saved = state["identity"][key]
            if saved != value:
                raise UserError(
                    f"{key}={value} differs from {saved} of the checkpoint, which changes the order of the "
                    f"data: set {key} back, or start a new run from the weights with init_from"
                )
        self.close()
        self._state = StreamState(
            PackCursor.from_dict(state["cursor"]),
            int(state["consumed_packs"]),
            int(state["consumed_samples"]),
            int(state["consumed_tokens"]),
        )

    def _identity(self) -> dict[str, Any]:
        """Everything that the meaning of a cursor depends on, under the names of the configuration."""
        return {
            "data.train (fingerprint)": self._store.fingerprint[:16],
            "seed": self._spec.seed,
            "train.micro_batch_tokens": self._spec.micro_batch_tokens,
            "data.max_seq_length": self._spec.data.max_seq_length,
            "data.pack_window": self._spec.data.pack_window,
        }

    def _batches(self, state: StreamState) -> Iterator[tuple[PackedBatch, StreamState]]:
        """Yields this rank's batches behind `state`, each with the state once every rank took its own."""
        while True:
            packs, cursor = self._plan.take(state.cursor, self._dp_size)
            state = state.after(packs, cursor)
            yield build_batch(self._store, self._spec, packs[self._dp_rank]), state


class EvalPacks:
    """A split for evaluation: every protein once, the same crops and masks each time it is iterated over.

    Crop and masks of a protein follow from the seed and its number in the store, so the loss of a whole
    split does not depend on packs and ranks. Packs come in a fixed random order, so that a limit takes a
    fair sample. When the packs do not divide among the ranks, some ranks end with a batch of padding
    without labels: all ranks run equally many micro-batches.
    """

    def __init__(
        self, store: TokenStore, spec: BatchSpec, limit: int = 0, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Selects this rank's batches.

        Args:
            store: proteins of the split.
            spec: content of the batches.
            limit: packs over all ranks; 0 for the whole split.
            dp_rank: data-parallel rank of this process.
            dp_size: number of data-parallel ranks.
        """
        self._store = store
        # Masks of validation protein k shall not repeat those of training sample k.
        self._spec = replace(spec, seed=sampling.derive_seed(spec.seed, sampling.Purpose.EVALUATION))
        self._limit = limit or None
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._plan = PackPlan(store.lengths, self._spec.seed, spec.pack_shape(), num_samples=len(store))

    @functools.cached_property
    def num_packs(self) -> int:
        """Packs over all ranks, without those of padding only."""
        return sum(1 for _ in itertools.islice(self._plan, self._limit))

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.num_packs // self._dp_size)

    def __iter__(self) -> Iterator[PackedBatch]:
        packs = itertools.islice(self._plan, self._limit)
        padding = Pack(_NO_SAMPLES, _NO_SAMPLES, _NO_SAMPLES)
        while dealt := list(itertools.islice(packs, self._dp_size)):
            pack = dealt[self._dp_rank] if self._dp_rank < len(dealt) else padding
            yield build_batch(self._store, self._spec, replace(pack, samples=pack.sequences))
