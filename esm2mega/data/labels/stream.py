"""Builds micro-batches of labelled proteins, and serves them for training and evaluation.

T   tokens of a pack, padding included: `train.micro_batch_tokens`, or `BatchSpec.capacity`
n   proteins (or pieces of them) of a pack
R   residues of these
k   outputs
m   target columns
P   pairs of residues of the same protein, see `esm2mega.pairs`
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esm2mega import vocabulary
from esm2mega.batch import LabelledBatch, Segments
from esm2mega.data import counter_rng
from esm2mega.data.counter_rng import Purpose
from esm2mega.data.labels.contacts import pair_labels
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import IGNORED
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import PADDING, BatchSpec, Share, StreamState, deal, piece_tokens
from esm2mega.data.stream.loader import PackStream, SplitPacks
from esm2mega.data.stream.packing import Pack
from esm2mega.data.stream.prefetch import Prefetcher
from esm2mega.data.stream.samples import TrainSamples


@dataclass(frozen=True)
class UnlabelledProteins:
    """Offers the proteins of a token store, without reading them into memory, in place of `LabelledProteins`.

    Without labels, they serve for prediction.
    """

    store: TokenStore

    clusters = None
    labels = None
    per_residue = False
    per_pair = False

    def __len__(self) -> int:
        return len(self.store)

    @property
    def path(self) -> Path:
        """Return the path of the store."""
        return self.store.path

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Return the number of residues of each protein, ``[n]``."""
        return self.store.lengths

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the store."""
        return self.store.fingerprint

    def id(self, row: int) -> str:
        """Return the id of a protein."""
        return self.store.id(row)

    def residues(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the token ids of a protein's residues, ``[L]``."""
        return self.store.residues(row)


def build_labelled(
    proteins: LabelledProteins | UnlabelledProteins, spec: BatchSpec, pack: Pack
) -> LabelledBatch:
    """Read, crop and lay out one pack."""
    pieces, capacity = pack.pieces, spec.capacity(pack)
    tokens = piece_tokens([proteins], pieces)
    packed = np.cumsum(pieces.lengths) - pieces.lengths  # where each piece begins in `tokens`
    owners = np.repeat(np.arange(len(pieces)), pieces.lengths)
    within = np.arange(len(tokens)) - packed[owners]
    places = pack.offsets[owners] + within
    input_ids = np.full(capacity, vocabulary.PAD, dtype=np.int64)
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
        assert isinstance(proteins, LabelledProteins)
        labels = labels[proteins.offsets[pieces.rows][owners] + numbers]
        if proteins.per_pair:
            counts = np.bincount(owners, minlength=len(pieces))
            each = np.split(labels, np.cumsum(counts)[:-1]) if len(pieces) else []
            labels = np.concatenate([np.zeros(0, np.int8), *(pair_labels(x, IGNORED) for x in each)])
    keys = counter_rng.stream_starts(spec.seed, Purpose.DROPOUT, pieces.samples).astype(np.int64)
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
    batch = LabelledBatch(
        torch.from_numpy(input_ids),
        np.diff(borders).tolist(),
        segments,
        None if labels is None else torch.from_numpy(labels),
        torch.from_numpy(pieces.rows.copy()),
        len(tokens),
        len(numbers),
        len(pieces),
        pieces.sample_starts(),
    )
    return batch.packed_up() if torch.cuda.is_available() else batch


class LabelledStream(PackStream[LabelledBatch]):
    """Iterates over this rank's batches of labelled proteins without end; close it after use."""

    def __init__(
        self, proteins: LabelledProteins, spec: BatchSpec, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Start at the first pack.

        Args:
            proteins: Proteins to train on.
            spec: Content of the batches.
            dp_rank: Data-parallel rank of this process.
            dp_size: Number of data-parallel ranks.
        """
        super().__init__(TrainSamples([proteins], spec.data, spec.seed), spec, Share(dp_rank, dp_size))
        self._proteins = proteins

    def _start(self) -> Prefetcher[tuple[LabelledBatch, StreamState]]:
        return Prefetcher(self._batches(self._state), self._num_ahead)

    def _batches(self, state: StreamState) -> Iterator[tuple[LabelledBatch, StreamState]]:
        for number, pack, behind in deal(self.samples, self._spec, self._share, state):
            yield replace(build_labelled(self._proteins, self._spec, pack), pack=number), behind

    def _padding(self) -> LabelledBatch:
        return build_labelled(self._proteins, self._spec, PADDING)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "data.too_long": self._spec.data.too_long}


class LabelledPacks(SplitPacks[LabelledBatch]):
    """Serves every labelled protein once, in a fixed order; see `SplitPacks`."""

    def __init__(
        self,
        proteins: LabelledProteins | UnlabelledProteins,
        spec: BatchSpec,
        limit: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Select this rank's batches; the arguments are those of `SplitPacks`."""
        super().__init__(proteins, spec, limit, dp_rank, dp_size)
        self._proteins = proteins

    def _build(self, pack: Pack) -> LabelledBatch:
        return build_labelled(self._proteins, self._spec, pack)
