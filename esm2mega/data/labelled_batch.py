"""From a pack of labelled proteins to one micro-batch, and the streams of them for training and evaluation.

T   tokens of a pack (`train.micro_batch_tokens`), padding included
n   proteins (or pieces of them) of a pack
R   residues of these
k   outputs
m   target columns
P   pairs of residues of the same protein, see `esm2mega.data.contacts`
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esm2mega.data import sampling, tokenizer
from esm2mega.data.batch import PADDING, BatchSpec, Share, StreamState, piece_tokens, train_plan
from esm2mega.data.contacts import pair_labels
from esm2mega.data.labelled import LabelledProteins
from esm2mega.data.loader import PackStream, SplitPacks
from esm2mega.data.packing import Pack
from esm2mega.data.prefetch import Prefetcher
from esm2mega.data.samples import TrainSamples
from esm2mega.data.sampling import Purpose
from esm2mega.data.targets import IGNORED


@dataclass(frozen=True)
class Segments:
    """Where the proteins and their residues lie in a pack: what a head knows besides hidden states.

    Attributes:
        num_proteins: n.
        first: Place of each protein's first token, its `<cls>` unless that was cropped away, int64 ``[n]``.
        residues: Places of the residues, ascending, int64 ``[R]``.
        owners: Which of the n proteins each residue belongs to, int64 ``[R]``.
        numbers: Number of each residue within its whole protein, from 0, int64 ``[R]``.
        keys: Random 64 bits of each protein in this step, for dropout; int64 ``[n]``.
        tokens: Token ids of each protein as bytes, on the host: what hidden states depend on.
        starts: `first` on the host.
    """

    num_proteins: int
    first: Tensor
    residues: Tensor
    owners: Tensor
    numbers: Tensor
    keys: Tensor
    tokens: tuple[bytes, ...]
    starts: tuple[int, ...]

    @property
    def spans(self) -> list[slice]:
        """Where in its own tokens the residues of each protein are, on the host."""
        return [
            slice(int(text[0] == tokenizer.CLS), len(text) - int(text[-1] == tokenizer.EOS))
            for text in self.tokens
        ]

    @property
    def residue_counts(self) -> list[int]:
        """Residues of each protein, on the host."""
        return [span.stop - span.start for span in self.spans]

    @staticmethod
    def of_protein(tokens: Tensor) -> Segments:
        """A pack of one whole protein with `<cls>` and `<eos>`, int64 ``[T]``; without randomness."""
        residues = torch.arange(1, len(tokens) - 1)
        nothing = torch.zeros(1, dtype=torch.int64)
        content = tokens.numpy().astype("uint8").tobytes()
        owners = torch.zeros_like(residues)
        return Segments(1, nothing, residues, owners, residues - 1, nothing, (content,), (0,))

    def to(self, device: torch.device | str) -> Segments:
        """The same on `device`."""
        names = ("first", "residues", "owners", "numbers", "keys")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class LabelledBatch:
    """One micro-batch of labelled proteins.

    Attributes:
        input_ids: Token ids, `<pad>` behind the last protein, int64 ``[T]``.
        seqlens: Tokens of each segment on the host, padding included; they add up to T.
        wanted: Where proteins and residues lie: what the model needs for its head.
        labels: Float64 ``[n, k]`` (NaN: none) or int64 ``[n]`` (-100: none) of proteins; of residues,
            ``[R, m]`` of either; of pairs int8 ``[P]``. None for prediction.
        rows: Which protein of the table each is, int64 ``[n]``.
        num_tokens: Tokens of proteins, without padding.
        num_residues: R.
        num_sequences: n.
    """

    input_ids: Tensor
    seqlens: list[int]
    wanted: Segments
    labels: Tensor | None
    rows: Tensor
    num_tokens: int
    num_residues: int
    num_sequences: int

    label_counts = None
    """Every hidden state is needed, so the last layer computes all of them."""

    def to(self, device: torch.device | str) -> LabelledBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            wanted=self.wanted.to(device),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )

    def without_labels(self) -> LabelledBatch:
        """The same tokens, of which nothing is predicted."""
        nothing = self.rows[:0]
        segments = Segments(0, nothing, nothing, nothing, nothing, nothing, (), ())
        labels = None if self.labels is None else self.labels[:0]
        return replace(self, wanted=segments, labels=labels, rows=nothing, num_residues=0, num_sequences=0)


def build_labelled(proteins: LabelledProteins, spec: BatchSpec, pack: Pack) -> LabelledBatch:
    """Reads, crops and lays out one pack."""
    pieces, capacity = pack.pieces, spec.micro_batch_tokens
    tokens = piece_tokens([proteins], pieces)
    packed = np.cumsum(pieces.lengths) - pieces.lengths  # where each piece begins in `tokens`
    owners = np.repeat(np.arange(len(pieces)), pieces.lengths)
    within = np.arange(len(tokens)) - packed[owners]
    places = pack.offsets[owners] + within
    input_ids = np.full(capacity, tokenizer.PAD, dtype=np.int64)
    input_ids[places] = tokens
    borders = np.unique(np.concatenate([[0, capacity], pack.offsets, pack.offsets + pieces.lengths]))
    # Token 0 of a protein is <cls>, token i + 1 its residue i.
    numbers = pieces.starts[owners] + within - 1
    is_residue = (numbers >= 0) & (numbers < proteins.lengths[pieces.rows][owners])
    numbers, owners = numbers[is_residue], owners[is_residue]
    labels = proteins.labels
    if labels is not None and not proteins.per_residue:
        labels = labels[pieces.rows]
    elif labels is not None:
        labels = labels[proteins.offsets[pieces.rows][owners] + numbers]
        if proteins.per_pair:
            counts = np.bincount(owners, minlength=len(pieces))
            each = np.split(labels, np.cumsum(counts)[:-1]) if len(pieces) else []
            labels = np.concatenate([np.zeros(0, np.int8), *(pair_labels(x, IGNORED) for x in each)])
    keys = sampling.stream_starts(spec.seed, Purpose.DROPOUT, pieces.samples).astype(np.int64)
    segments = Segments(
        len(pieces),
        torch.from_numpy(pack.offsets.copy()),
        torch.from_numpy(places[is_residue]),
        torch.from_numpy(owners),
        torch.from_numpy(numbers),
        torch.from_numpy(keys),
        tuple(tokens[a:b].tobytes() for a, b in itertools.pairwise([*packed.tolist(), len(tokens)])),
        tuple(pack.offsets.tolist()),
    )
    return LabelledBatch(
        torch.from_numpy(input_ids),
        np.diff(borders).tolist(),
        segments,
        None if labels is None else torch.from_numpy(labels),
        torch.from_numpy(pieces.rows.copy()),
        len(tokens),
        len(numbers),
        len(pieces),
    )


class LabelledStream(PackStream[LabelledBatch]):
    """Endless iterator over this rank's batches of labelled proteins; close it after use."""

    def __init__(
        self, proteins: LabelledProteins, spec: BatchSpec, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Starts at the first pack.

        Args:
            proteins: To train on.
            spec: Content of the batches.
            dp_rank: Data-parallel rank of this process.
            dp_size: Number of data-parallel ranks.
        """
        super().__init__(TrainSamples([proteins], spec.data, spec.seed), spec, Share(dp_rank, dp_size))
        self._proteins = proteins

    def _start(self) -> Prefetcher[tuple[LabelledBatch, StreamState]]:
        return Prefetcher(self._batches(self._state))

    def _finish(self, built: LabelledBatch) -> LabelledBatch:
        return built

    def _batches(self, state: StreamState) -> Iterator[tuple[LabelledBatch, StreamState]]:
        plan = train_plan(self.samples, self._spec)
        share = self._share
        while True:
            packs, cursor = plan.take(state.cursor, share.dp_size)
            state = state.after(packs, cursor)
            pack = packs[share.dp_rank] if share.dp_rank < len(packs) else PADDING
            yield build_labelled(self._proteins, self._spec, pack), state

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "data.too_long": self._spec.data.too_long}


class LabelledPacks(SplitPacks[LabelledBatch]):
    """Every labelled protein once, in a fixed order; see `SplitPacks`."""

    def __init__(
        self, proteins: LabelledProteins, spec: BatchSpec, limit: int = 0, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Selects this rank's batches; the arguments are those of `EvalPacks`."""
        super().__init__(proteins, spec, limit, dp_rank, dp_size)
        self._proteins = proteins

    def _build(self, pack: Pack) -> LabelledBatch:
        return build_labelled(self._proteins, self._spec, pack)
