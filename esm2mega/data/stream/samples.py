"""Decides which piece of which protein sample k is: epochs, clusters, mixtures of stores, cropping.

A sample is drawn in up to three steps, each a pure function of (seed, k) in constant memory:

    store      in each block of 65,536 samples every store has the share of its weight, in random order
    protein    each epoch of a store takes every protein once, in an order of its own; of a store with
               clusters, every cluster once, and one of its members at random, all equally likely
    piece      a window of `data.max_seq_length` tokens of a longer protein, or all its chunks

Tokens of a protein are numbered from `<cls>`, 0, to `<eos>`. This module reads only the lengths of proteins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from esm2mega.config.schema import DataConfig
from esm2mega.data import counter_rng
from esm2mega.data.counter_rng import Integers, Purpose, SampleOrder
from esm2mega.data.store.clusters import MEMBERS, OFFSETS, Clusters
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError

MIXTURE_BLOCK = 1 << 16
"""A mixture has its exact shares in every block of this many samples, so shares are multiples of 1/65,536."""


class Proteins(Protocol):
    """Says what samples need of proteins, which are a `TokenStore` or labelled proteins in memory."""

    @property
    def path(self) -> Path: ...
    @property
    def clusters(self) -> Clusters | None: ...
    @property
    def lengths(self) -> npt.NDArray[Any]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def id(self, row: int) -> str: ...
    def residues(self, row: int) -> npt.NDArray[np.uint8]: ...


TRAIN_FINGERPRINTS = "data.train (fingerprint)"
"""Names the entry of a checkpoint's state that identifies each of the stores that were trained on."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """Describes pieces of proteins, as the model reads them; all arrays are int64.

    Attributes:
        samples: sample number k of each, which selects its random numbers (in evaluation the row, which
            selects the crop alone), [n].
        stores: number of the store of each, [n].
        rows: row of the protein in that store, [n].
        starts: first token of the piece within the protein, [n].
        lengths: tokens of the piece, [n].
    """

    samples: Integers
    stores: Integers
    rows: Integers
    starts: Integers
    lengths: Integers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, places: slice | Integers) -> Pieces:
        """Return the pieces at `places`, in that order."""
        return Pieces(
            self.samples[places],
            self.stores[places],
            self.rows[places],
            self.starts[places],
            self.lengths[places],
        )

    def sample_starts(self) -> list[tuple[int, int]]:
        """Return the number of the sample and of the first token of each piece; no two are alike."""
        return list(zip(self.samples.tolist(), self.starts.tolist(), strict=True))


class TrainSamples:
    """Looks up the endless sequence of training samples."""

    def __init__(self, stores: Sequence[Proteins], config: DataConfig, seed: int) -> None:
        """Fix the sequence.

        Args:
            stores: proteins to train on, one store or more.
            config: section of which `sampling`, `weights`, `crop` and `max_seq_length` count here.
            seed: seed of the run.
        """
        self.stores = stores
        self._config = config
        self._seed = seed
        seeds = [seed] if len(stores) == 1 else [_seed_of_store(seed, i) for i in range(len(stores))]
        self._orders = [
            _StoreOrder(store, config.sampling, own) for store, own in zip(stores, seeds, strict=True)
        ]
        self._mixture = None
        if len(stores) > 1:
            sizes = [float(order.size) for order in self._orders]
            self._mixture = Mixture(config.weights or sizes, seed)

    @property
    def epoch_size(self) -> int | None:
        """Return the samples of an epoch: proteins, or clusters, of a single store; None for a mixture."""
        return self.size if self._mixture is None else None

    @property
    def size(self) -> int:
        """Return the number of proteins, or clusters, of all stores together."""
        return sum(order.size for order in self._orders)

    def __call__(self, samples: Integers) -> Pieces:
        """Look up samples.

        Args:
            samples: sample numbers from 0, [n].

        Returns:
            One piece for each sample, or all chunks of its protein when `crop` is `chunk`.
        """
        stores, numbers = np.zeros_like(samples), samples
        if self._mixture is not None:
            stores, numbers = self._mixture(samples)
        rows, num_tokens = np.empty_like(samples), np.empty_like(samples)
        for i, order in enumerate(self._orders):
            own = slice(None) if len(self._orders) == 1 else np.flatnonzero(stores == i)
            rows[own] = order(numbers[own], samples[own])
            num_tokens[own] = _num_tokens(self.stores[i], rows[own])
        return _cut(samples, stores, rows, num_tokens, self._config, self._seed)

    @property
    def takes_all(self) -> bool:
        """Return whether an epoch is every protein of a single store once."""
        return len(self._orders) == 1 and self._orders[0].sampling == "sequences"

    def names(self, pieces: Pieces) -> list[str]:
        """Return the ids of pieces, with the range of residues where that is not the whole protein."""
        columns = (pieces.stores, pieces.rows, pieces.starts, pieces.lengths)
        return [
            piece_name(self.stores[store].id(row), start, length, int(self.stores[store].lengths[row]))
            for store, row, start, length in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def describe(self) -> list[str]:
        """Return a line on each store: how much is drawn from what."""
        lines = []
        for i, (store, order) in enumerate(zip(self.stores, self._orders, strict=True)):
            drawn = f"{order.size} clusters of " if order.sampling == "clusters" else ""
            share = ""
            if self._mixture is not None:
                share = f", {self._mixture.shares[i] / MIXTURE_BLOCK:.2%} of the samples"
            lines.append(f"{drawn}{len(store)} sequences of {store.path}{share}")
        return lines

    def identity(self) -> dict[str, Any]:
        """Return what the sequence depends on, under the names of the configuration."""
        return {
            TRAIN_FINGERPRINTS: [order.fingerprint for order in self._orders],
            "data.weights": None if self._mixture is None else self._mixture.shares.tolist(),
            "data.sampling": [order.sampling for order in self._orders],
            "data.max_seq_length": self._config.max_seq_length,
            "data.crop": self._config.crop,
            "seed": self._seed,
        }


def fingerprint_by_clusters(store: TokenStore) -> str:
    """Return what identifies a store of which clusters are drawn: its proteins, their order, the clusters."""
    files = store.manifest["files"]
    hashes = [store.fingerprint, *(files[name]["sha256"] for name in (OFFSETS, MEMBERS))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


class EvalSamples:
    """Takes every protein of a store once, in a fixed random order, without regard to clusters.

    The sample number of a piece is the row of its protein, so that its crop does not depend on the order and
    the size of the store.
    """

    def __init__(self, store: Proteins, config: DataConfig, seed: int) -> None:
        """Fix the order; of `config`, `crop` and `max_seq_length` count here."""
        self.store = store
        self._config = config
        self._seed = seed
        self._order = SampleOrder(len(store), seed)

    def __call__(self, places: Integers) -> Pieces:
        """Look up places of the order, [n], each from 0 to below the number of proteins."""
        _, rows = self._order(places)
        num_tokens = _num_tokens(self.store, rows)
        return _cut(rows, np.zeros_like(rows), rows, num_tokens, self._config, self._seed)


class Mixture:
    """Assigns samples to stores: in every block of 65,536 each gets its share, in a new random order."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Turn weights into shares, which add up to the block.

        Args:
            weights: weight of each store, greater than 0; they may have any sum.
            seed: seed of the run.
        """
        exact = np.asarray(weights, dtype=np.float64) / sum(weights) * MIXTURE_BLOCK
        self.shares = np.floor(exact).astype(np.int64)
        largest_rest_first = np.argsort(self.shares - exact, kind="stable")
        self.shares[largest_rest_first[: MIXTURE_BLOCK - int(self.shares.sum())]] += 1
        if not self.shares.all():
            raise UserError(
                f"data.weights={list(weights)}: store number {int(np.argmin(self.shares)) + 1} has less than "
                f"1/{MIXTURE_BLOCK} of the sum; raise its weight or leave it out of data.train"
            )
        self._ends = np.cumsum(self.shares)
        self._seed = seed

    def __call__(self, samples: Integers) -> tuple[Integers, Integers]:
        """Look up samples.

        Args:
            samples: sample numbers of the mixture, [n].

        Returns:
            The store of each sample and the sample number within that store, both [n]. The samples of a store
            get every number from 0 on once, block by block.
        """
        blocks, places = np.divmod(samples, MIXTURE_BLOCK)
        dealt = counter_rng.permute(places, MIXTURE_BLOCK, self._seed, Purpose.MIXTURE, blocks)
        stores = np.searchsorted(self._ends, dealt, side="right")
        within = dealt - (self._ends - self.shares)[stores]
        return stores, blocks * self.shares[stores] + within


def piece_name(identifier: str, start: int, length: int, residues: int) -> str:
    """Return the id of a piece: that of the protein, with the range of residues unless it is the whole.

    Args:
        identifier: id of the protein.
        start: first token of the piece within `<cls>` residues `<eos>`.
        length: tokens of the piece.
        residues: residues of the whole protein.

    Returns:
        `id`, or `id/FIRST-LAST`, from 1 and inclusive; LAST is `end` in the last piece of a protein.
    """
    first, last = max(start, 1), min(start + length - 1, residues)
    if first == 1 and last == residues:
        return identifier
    return f"{identifier}/{first}-{'end' if last == residues else last}"


class _StoreOrder:
    """Looks up the endless sequence of the proteins of one store."""

    def __init__(self, store: Proteins, sampling: str, seed: int) -> None:
        """Fix the sequence; `sampling` is `data.sampling`."""
        self._clusters = None if sampling == "sequences" else store.clusters
        if sampling == "clusters" and self._clusters is None:
            raise UserError(
                f"data.sampling=clusters, but {store.path} has no clusters: make it with `esm2mega prepare "
                "uniref`, or set data.sampling=sequences"
            )
        self.sampling = "sequences" if self._clusters is None else "clusters"
        self.size = len(store) if self._clusters is None else len(self._clusters)
        self.fingerprint = store.fingerprint[:16]
        if self._clusters is not None:
            self.fingerprint = fingerprint_by_clusters(cast(TokenStore, store))  # nothing else has clusters
        self._seed = seed
        self._order = SampleOrder(self.size, seed)

    def __call__(self, numbers: Integers, samples: Integers) -> Integers:
        """Return the row of each sample in the store, [n].

        Args:
            numbers: sample numbers of this store, [n].
            samples: sample numbers of the run, which select the random numbers, [n].
        """
        _, drawn = self._order(numbers)
        if self._clusters is None:
            return drawn
        first = self._clusters.offsets[drawn]
        sizes = self._clusters.offsets[drawn + 1] - first
        bits = counter_rng.bits_at(counter_rng.stream_starts(self._seed, Purpose.MEMBER, samples), 0)
        return self._clusters.members[first + counter_rng.integers_below(bits, sizes)]


def _seed_of_store(seed: int, store: int) -> int:
    """Return a seed for the order of one of several stores, so that equally large ones do not share it."""
    return int(counter_rng.bits_at(counter_rng.stream_starts(seed, Purpose.STORE, store), 0)[0])


def _num_tokens(store: Proteins, rows: Integers) -> Integers:
    """Return the number of tokens of whole proteins, with `<cls>` and `<eos>`, [n]."""
    return store.lengths[rows].astype(np.int64) + 2


def _cut(
    samples: Integers, stores: Integers, rows: Integers, num_tokens: Integers, config: DataConfig, seed: int
) -> Pieces:
    """Cut proteins, all arrays [n], into the pieces that `data.crop` and `data.max_seq_length` ask for."""
    if config.crop == "chunk":
        proteins, starts, lengths = chunk(num_tokens, config.max_seq_length)
        return Pieces(samples[proteins], stores[proteins], rows[proteins], starts, lengths)
    starts = counter_rng.crop_starts(seed, samples, num_tokens, config.max_seq_length, config.crop)
    return Pieces(samples, stores, rows, starts, np.minimum(num_tokens, config.max_seq_length))


def chunk(num_tokens: npt.ArrayLike, max_seq_length: int) -> tuple[Integers, Integers, Integers]:
    """Cut every protein into the fewest chunks of at most `max_seq_length` - 2 residues.

    The chunks of a protein differ by one residue at most, the longer ones first. The first chunk has `<cls>`,
    the last has `<eos>`, and those between have neither.

    Args:
        num_tokens: tokens of whole proteins, [n].
        max_seq_length: largest number of tokens of a protein in one chunk.

    Returns:
        Protein (below n), first token and number of tokens of each of the m chunks of all proteins, each [m].
    """
    residues = np.asarray(num_tokens, dtype=np.int64) - 2
    counts = np.maximum(-(-residues // (max_seq_length - 2)), 1)
    proteins = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(proteins)) - np.repeat(np.cumsum(counts) - counts, counts)
    short, longer_ones = (part[proteins] for part in np.divmod(residues, counts))
    first_residues = numbers * short + np.minimum(numbers, longer_ones)
    is_first, is_last = numbers == 0, numbers == counts[proteins] - 1
    starts = np.where(is_first, 0, first_residues + 1)
    return proteins, starts, short + (numbers < longer_ones) + is_first + is_last
