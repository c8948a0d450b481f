"""Plans which samples share a pack of T tokens: a pure function of lengths and seed, window by window.

A window is `data.pack_window` consecutive samples. Its pieces are packed by best fit, longest first, or put
into padded batches of similar length, and the packs are shuffled, since the first ones hold the longest
proteins. Every rank plans the same windows for itself; a position in the endless sequence of packs is a
`PackCursor`, which is all that a resumed run needs.

Planning handles pieces of one length, and packs with equal room left, together, and not sample by sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data import counter_rng
from esm2mega.data.counter_rng import Integers, Purpose
from esm2mega.data.stream.samples import Pieces
from esm2mega.errors import UserError

# A plan keeps this many windows, since a global batch may reach from one window into the next.
_CACHED_WINDOWS = 2

# A window has this many samples per token of a pack, which makes 2700 packs of UniRef proteins, whatever T
# is. Windows are large because the last one or two packs of each are not full, and planning each has a cost.
_WINDOW_PER_TOKEN = 8


def plan_packs(num_tokens: npt.ArrayLike, capacity: int) -> Integers:
    """Pack the pieces of one window, longest first, each into the fullest pack that has room for it.

    Of several equally full packs the one that was filled to that level last is taken. Proteins cropped to
    1024 tokens leave some 0.1 % of the tokens of packs of 4096 empty, nearly all of them in the last packs.

    Args:
        num_tokens: tokens of each piece, [n], each between 1 and `capacity`.
        capacity: tokens of a pack, T.

    Returns:
        The pack of each piece, [n]; packs are numbered from 0 on in the order in which they were opened.
    """
    lengths = _checked(num_tokens, capacity)
    counts = np.bincount(lengths)
    present = np.flatnonzero(counts)[::-1]
    packs = _Packs(capacity)
    for length, count in zip(present.tolist(), counts[present].tolist(), strict=True):
        packs.add(length, count)
    # Each step of the plan put the next pieces, longest first, into consecutive packs, `per_pack` into each.
    first_pack, per_pack, num_pieces = np.array(packs.steps, dtype=np.int64).reshape(-1, 3).T
    within = np.arange(len(lengths)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[_longest_first(lengths)] = np.repeat(first_pack, num_pieces) + within // np.repeat(
        per_pack, num_pieces
    )
    return pack_of


class _Packs:
    """Holds the packs that are being filled, by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        """Start without packs; each will have `capacity` tokens."""
        self.steps: list[tuple[int, int, int]] = []  # first pack, pieces into each pack, pieces
        self._capacity = capacity
        self._count = 0
        self._open: dict[int, list[tuple[int, int]]] = {}  # room left -> ranges of packs, first and end
        # Bit r is set when _open[r] is not empty: finding the tightest fit is finding the lowest bit.
        self._rooms = 0

    def add(self, length: int, count: int) -> None:
        """Add `count` pieces of one length, which is not above the length of the pieces before."""
        while count:
            fitting = self._rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pack, end = self._open[room].pop()
                if not self._open[room]:
                    self._rooms ^= 1 << room
            else:
                room, pack = self._capacity, self._count
                self._count = end = pack + -(-count // (room // length))
            # A pack that took a piece is the tightest one until no further piece fits.
            per_pack = room // length
            full = min(end - pack, count // per_pack)
            if full:
                self._put(pack, pack + full, room, length, per_pack)
            count, pack = count - full * per_pack, pack + full
            if count and pack < end:
                self._put(pack, pack + 1, room, length, count)
                count, pack = 0, pack + 1
            if pack < end:
                self._leave(pack, end, room)

    def _put(self, pack: int, end: int, room: int, length: int, per_pack: int) -> None:
        self.steps.append((pack, per_pack, (end - pack) * per_pack))
        self._leave(pack, end, room - per_pack * length)

    def _leave(self, pack: int, end: int, room: int) -> None:
        if room:
            self._open.setdefault(room, []).append((pack, end))
            self._rooms |= 1 << room


def plan_buckets(num_tokens: npt.ArrayLike, capacity: int) -> Integers:
    """Put pieces of similar length into padded batches, as many as fit when padded to the longest of them.

    Args:
        num_tokens: tokens of each piece, [n], each between 1 and `capacity`.
        capacity: tokens of a batch with its padding, T.

    Returns:
        The batch of each piece, [n], numbered from 0 on from the longest pieces to the shortest.
    """
    lengths = _checked(num_tokens, capacity)
    order = _longest_first(lengths)
    descending = lengths[order]
    pack_of = np.empty(len(lengths), dtype=np.int64)
    first = number = 0
    while first < len(lengths):
        end = first + capacity // int(descending[first])
        pack_of[order[first:end]] = number
        first, number = end, number + 1
    return pack_of


def _checked(num_tokens: npt.ArrayLike, capacity: int) -> Integers:
    lengths = np.asarray(num_tokens, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} do not fit packs of {capacity}")
    return lengths


def _longest_first(lengths: Integers) -> Integers:
    """Return the indices of the pieces, longest first and then ascending, [n]."""
    # Sorting one number per piece is several times faster than sorting indices by it.
    size = max(len(lengths), 1)
    return np.sort((lengths.max(initial=0) - lengths) * size + np.arange(len(lengths))) % size


_PLANNERS: dict[str, Callable[[npt.ArrayLike, int], Integers]] = {
    "pack": plan_packs,
    "bucket": plan_buckets,
}


@dataclass(frozen=True, eq=False)
class PackWindow:
    """Holds the packs of one window, in their order.

    Attributes:
        pieces: all pieces, pack by pack and within a pack in the order of their samples, [n].
        offsets: where each piece begins within its pack, int64 [n].
        bounds: where each pack begins in `pieces`, and the end, [packs + 1].
        num_tokens: tokens of each pack without padding, [packs].
        costs: what attention costs in each pack, [packs]: the sum over its segments of their tokens squared,
            since the padding between and behind pieces attends to itself.
    """

    pieces: Pieces
    offsets: Integers
    bounds: list[int]
    num_tokens: list[int]
    costs: list[int]

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.num_tokens)

    @classmethod
    def of(cls, pieces: Pieces, pack_of: Integers, capacity: int | None, padded: bool) -> PackWindow:
        """Sort pieces by pack, and lay them out.

        Args:
            pieces: pieces in the order of their samples, at least one, [n].
            pack_of: pack of each piece, [n]; every pack from 0 to the largest has at least one piece.
            capacity: tokens of a pack, T; None where packs end behind their last piece.
            padded: whether every piece of a pack takes as much room as the longest one.
        """
        pieces = pieces[np.sort(pack_of * len(pieces) + np.arange(len(pieces))) % len(pieces)]
        counts = np.bincount(pack_of)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        ends = np.concatenate([[0], np.cumsum(pieces.lengths)])
        if padded:
            rows = np.arange(len(pieces)) - np.repeat(bounds[:-1], counts)
            offsets = rows * np.repeat(np.maximum.reduceat(pieces.lengths, bounds[:-1]), counts)
        else:
            offsets = ends[:-1] - np.repeat(ends[bounds[:-1]], counts)
        stops = np.append(offsets[1:], 0)  # where the padding behind each piece ends
        last = bounds[1:] - 1
        stops[last] = offsets[last] + pieces.lengths[last] if capacity is None else capacity
        segments = pieces.lengths**2 + (stops - offsets - pieces.lengths) ** 2
        costs = np.add.reduceat(segments, bounds[:-1])
        return cls(pieces, offsets, bounds.tolist(), np.diff(ends[bounds]).tolist(), costs.tolist())


_NOTHING = np.zeros(0, dtype=np.int64)
EMPTY_WINDOW = PackWindow(Pieces(*[_NOTHING] * 5), _NOTHING, [0], [], [])


@dataclass(frozen=True)
class Pack:
    """Refers to one pack of a window, and looks its content up when asked for."""

    window: PackWindow
    number: int

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all pieces together, without padding, at most T."""
        return self.window.num_tokens[self.number]

    @property
    def cost(self) -> int:
        """Return what attention costs in the pack, in products of tokens."""
        return self.window.costs[self.number]

    @property
    def num_pieces(self) -> int:
        """Return the number of pieces in the pack."""
        return self.window.bounds[self.number + 1] - self.window.bounds[self.number]

    @property
    def pieces(self) -> Pieces:
        """Return the pieces of the pack in the order of their samples, [n]."""
        return self.window.pieces[self._slice]

    @property
    def offsets(self) -> Integers:
        """Return where each piece begins in the pack, int64 [n]."""
        return self.window.offsets[self._slice]

    @property
    def _slice(self) -> slice:
        return slice(self.window.bounds[self.number], self.window.bounds[self.number + 1])


@dataclass(frozen=True)
class PackCursor:
    """Marks a position in the sequence of packs: the next pack is number `offset` of `window`."""

    window: int = 0
    offset: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the position as plain numbers for train_state.json."""
        return asdict(self)

    @staticmethod
    def from_dict(state: dict[str, Any]) -> PackCursor:
        """Invert `to_dict`."""
        return PackCursor(window=int(state["window"]), offset=int(state["offset"]))


@dataclass(frozen=True)
class PackShape:
    """Holds what decides which samples share a pack, besides the samples and the seed.

    Attributes:
        micro_batch_tokens: tokens of a pack, T.
        max_seq_length: tokens of the longest piece.
        pack_window: samples that are packed together; None for 8 T.
        packing: "pack", or "bucket" for padded batches of similar length.
        has_whole_tails: whether a pack with room left is padded up to T, which decides its cost alone.
    """

    micro_batch_tokens: int
    max_seq_length: int
    pack_window: int | None = None
    packing: str = "pack"
    has_whole_tails: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < self.max_seq_length:
            raise UserError(
                f"train.micro_batch_tokens={self.micro_batch_tokens} is smaller than "
                f"data.max_seq_length={self.max_seq_length}: the longest protein must fit into one pack"
            )
        if self.pack_window is not None and self.pack_window < 1:
            raise UserError(f"data.pack_window={self.pack_window} must be at least 1 sample")

    @property
    def window(self) -> int:
        """Return the number of samples of a window."""
        if self.pack_window is None:
            return _WINDOW_PER_TOKEN * self.micro_batch_tokens
        return self.pack_window


class PackPlan:
    """Plans the sequence of packs, which may have an end or none."""

    def __init__(
        self, draw: Callable[[Integers], Pieces], seed: int, shape: PackShape, num_samples: int | None = None
    ) -> None:
        """Fix the sequence; windows are planned when they are first asked for.

        Args:
            draw: function that returns the pieces of samples, given their numbers; one or more for each
                sample, of at most `max_seq_length` tokens.
            seed: seed of the run.
            shape: shape of packs and windows.
            num_samples: number of samples; None for no end.
        """
        self.shape = shape
        self.num_samples = num_samples
        self._draw = draw
        self._seed = seed
        self.window = functools.lru_cache(maxsize=_CACHED_WINDOWS)(self._plan)

    def take(self, cursor: PackCursor, count: int) -> tuple[list[Pack], PackCursor]:
        """Return the next `count` packs, fewer at the end, and the position behind them."""
        number, offset = cursor.window, cursor.offset
        taken: list[Pack] = []
        while len(taken) < count and len(window := self.window(number)):
            if not 0 <= offset < len(window):
                raise IndexError(f"pack {offset} of window {number}, which has {len(window)} packs")
            end = min(len(window), offset + count - len(taken))
            taken += [Pack(window, i) for i in range(offset, end)]
            number, offset = (number + 1, 0) if end == len(window) else (number, end)
        return taken, PackCursor(number, offset)

    def windows(self) -> Iterator[PackWindow]:
        """Yield the windows from the first one on; the plan must have an end."""
        number = 0
        while len(window := self.window(number)):
            yield window
            number += 1

    def _plan(self, number: int) -> PackWindow:
        """Plan one window; behind the end it is empty."""
        first = number * self.shape.window
        last = first + self.shape.window
        samples = np.arange(first, last if self.num_samples is None else min(last, self.num_samples))
        if not len(samples):
            return EMPTY_WINDOW
        pieces = self._draw(samples)
        pack_of = _PLANNERS[self.shape.packing](pieces.lengths, self.shape.micro_batch_tokens)
        count = int(pack_of.max()) + 1
        # Pack i of the plan comes at place shuffled[i].
        shuffled = counter_rng.permute(np.arange(count), count, self._seed, Purpose.PACK_ORDER, number)
        padded = self.shape.packing == "bucket"
        capacity = self.shape.micro_batch_tokens if self.shape.has_whole_tails else None
        return PackWindow.of(pieces, shuffled[pack_of], capacity, padded)
