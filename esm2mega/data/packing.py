"""Which samples share a pack of T tokens, planned window by window as a pure function of lengths and seed.

A window is `data.pack_window` consecutive samples. Its samples are packed best fit, longest first, and the
packs are shuffled, since the first ones hold the longest proteins. Every rank plans the same windows for
itself; a place in the endless sequence of packs is a `PackCursor`, which is all that a resumed run needs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data import sampling
from esm2mega.data.sampling import Integers, Purpose, SampleOrder
from esm2mega.errors import UserError

# Windows kept by a plan: a global batch may reach from one window into the next.
_CACHED_WINDOWS = 2


def plan_window(num_tokens: npt.ArrayLike, capacity: int) -> list[Integers]:
    """Packs the samples of one window, each into the fullest pack that still has room for it, longest first.

    Ties go to the pack that was opened last. For proteins cropped to 1024 tokens in packs of 4096 this
    leaves some 0.1 % of the tokens empty, nearly all of them in the last packs.

    Args:
        num_tokens: tokens of each sample, [n], each between 1 and `capacity`.
        capacity: tokens of a pack, T.

    Returns:
        For each pack the places of its samples in the window, ascending. Every sample is in exactly one pack.
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"sample lengths {lengths.min()} to {lengths.max()} do not fit packs of {capacity}")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> packs with exactly that room
    rooms = (
        0  # bit r is set when open_packs[r] is not empty; finding the tightest fit is finding its lowest bit
    )
    longest_first = np.argsort(-lengths, kind="stable")
    for place, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[room].pop()
            packs[pack].append(place)
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([place])
        left = room - length
        if left:
            open_packs.setdefault(left, []).append(pack)
            rooms |= 1 << left
    return [np.sort(np.asarray(places, dtype=np.int64)) for places in packs]


@dataclass(frozen=True, eq=False)
class Pack:
    """The samples of one pack, ascending.

    Attributes:
        samples: sample numbers, int64 [n].
        sequences: the protein of each sample in the store, int64 [n].
        lengths: tokens of each sample after cropping, int64 [n].
    """

    samples: Integers
    sequences: Integers
    lengths: Integers

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of all samples together, at most T."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class PackCursor:
    """A place in the sequence of packs: the next pack is number `offset` of `window`."""

    window: int = 0
    offset: int = 0

    def to_dict(self) -> dict[str, int]:
        """As plain numbers for train_state.json."""
        return asdict(self)

    @staticmethod
    def from_dict(state: dict[str, Any]) -> PackCursor:
        """Inverse of `to_dict`."""
        return PackCursor(window=int(state["window"]), offset=int(state["offset"]))


@dataclass(frozen=True)
class PackShape:
    """What decides which samples share a pack, besides the store and the seed.

    Attributes:
        micro_batch_tokens: tokens of a pack, T.
        max_seq_length: tokens at which a protein is cropped.
        window: samples that are packed together.
    """

    micro_batch_tokens: int
    max_seq_length: int
    window: int

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < self.max_seq_length:
            raise UserError(
                f"train.micro_batch_tokens={self.micro_batch_tokens} is smaller than "
                f"data.max_seq_length={self.max_seq_length}: the longest protein must fit into one pack"
            )
        if self.window < 1:
            raise UserError(f"data.pack_window={self.window} must be at least 1 sample")


class PackPlan:
    """The sequence of packs over a store, endless for training or one epoch for evaluation."""

    def __init__(
        self, lengths: npt.NDArray[np.int32], seed: int, shape: PackShape, num_samples: int | None = None
    ) -> None:
        """Fixes the sequence; windows are planned when they are first asked for.

        Args:
            lengths: residues of each protein of the store, without special tokens, [n].
            seed: seed of the run.
            shape: of packs and windows.
            num_samples: how many samples there are; None for no end.
        """
        self.shape = shape
        self.num_samples = num_samples
        self._lengths = lengths
        self._seed = seed
        self._order = SampleOrder(len(lengths), seed)
        self.window_packs = functools.lru_cache(maxsize=_CACHED_WINDOWS)(self._plan)

    def take(self, cursor: PackCursor, count: int) -> tuple[list[Pack], PackCursor]:
        """The next `count` packs, fewer at the end, and the place behind them."""
        window, offset = cursor.window, cursor.offset
        taken: list[Pack] = []
        while len(taken) < count and (packs := self.window_packs(window)):
            if not 0 <= offset < len(packs):
                raise IndexError(f"pack {offset} of window {window}, which has {len(packs)} packs")
            chosen = packs[offset : offset + count - len(taken)]
            taken += chosen
            offset += len(chosen)
            if offset == len(packs):
                window, offset = window + 1, 0
        return taken, PackCursor(window, offset)

    def __iter__(self) -> Iterator[Pack]:
        """Yields the packs from the first one on, each once."""
        window = 0
        while packs := self.window_packs(window):
            yield from packs
            window += 1

    def _plan(self, window: int) -> list[Pack]:
        """The packs of one window in their shuffled order; none behind the end."""
        first = window * self.shape.window
        last = first + self.shape.window
        samples = np.arange(first, last if self.num_samples is None else min(last, self.num_samples))
        if not len(samples):
            return []
        _, sequences = self._order(samples)
        lengths = np.minimum(self._lengths[sequences].astype(np.int64) + 2, self.shape.max_seq_length)
        packs = plan_window(lengths, self.shape.micro_batch_tokens)
        shuffled = sampling.permute(np.arange(len(packs)), len(packs), self._seed, Purpose.PACK_ORDER, window)
        return [
            Pack(samples[places], sequences[places], lengths[places])
            for places in (packs[number] for number in shuffled.tolist())
        ]
