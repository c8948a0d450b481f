"""Computes every random number of the data, and the order of an epoch, as pure functions of the seed.

There are no generator objects and no state: a random number is a hash of (seed, purpose, stream, position),
and the order of an epoch is a keyed permutation that is evaluated, not stored. So any rank can compute any
sample at once, for whole arrays, in constant memory, and a resumed run only needs to know how far it got.

The hash is splitmix64 (Steele, Lea, Flood 2014): the numbers of one stream are the outputs of that
generator, whose 64-bit start is hashed from seed, purpose and stream number. Two streams share numbers only
if their starts lie within reach on its cycle of 2**64 states: with 10**12 samples of 1024 tokens, one
sample in 10,000 meets another one in some place.

    stream     the sample number k in training; in evaluation a hash of the residues, which selects the masks,
               or the number of the protein, which selects the crop
    position   place within the stream, such as the token within the cropped protein
"""

from __future__ import annotations

import enum
import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

# splitmix64: step of its counter (2**64 / golden ratio) and the multipliers of its output function.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)

# Rounds of the Feistel network. Four are enough for large domains (Luby and Rackoff 1988); stores of a few
# proteins need more to reach every order equally often: measured, 24 do so for all sizes up to 8.
_ROUNDS = 24


class Purpose(enum.IntEnum):
    """Says what a random number decides; each purpose has its own. A changed value changes every run."""

    ORDER = 1
    PACK_ORDER = 2
    CROP = 3
    MASK = 4
    RESIDUE = 5
    SPLIT = 6
    EVALUATION = 7
    MEMBER = 8
    MIXTURE = 9
    STORE = 10
    DROPOUT = 11
    BOOTSTRAP = 12
    ENCODER_DROPOUT = 13
    DROPOUT_SAMPLE = 14


def mix(state: Bits) -> Bits:
    """Apply the output function of splitmix64, a bijection of 64-bit numbers, element by element."""
    state = (state ^ (state >> _SHIFT_1)) * _MULTIPLIER_1
    state = (state ^ (state >> _SHIFT_2)) * _MULTIPLIER_2
    return state ^ (state >> _SHIFT_3)


@functools.lru_cache(maxsize=64)
def derive_seed(seed: int, purpose: Purpose) -> int:
    """Derive the seed of one purpose from the seed of the run; any Python integer is a valid seed."""
    # Hashed twice, so that neighbouring seeds do not give the shifted keys of neighbouring purposes.
    state = mix(np.array([seed % 2**64], dtype=np.uint64) + _STEP)
    return int(bits_at(state, purpose)[0])


def stream_starts(seed: int, purpose: Purpose, streams: npt.ArrayLike) -> Bits:
    """Return the start states of streams, from which `bits_at` computes their numbers.

    Args:
        seed: seed of the run.
        purpose: what the numbers decide.
        streams: stream numbers, [n] or a single one.

    Returns:
        64-bit states, [n] or [1].
    """
    numbers = _unsigned(streams)
    key = np.uint64(derive_seed(seed, purpose))
    return mix(mix(numbers * _STEP + key) ^ key)


def bits_at(starts: Bits, positions: npt.ArrayLike) -> Bits:
    """Return 64 random bits at `positions` (from 0), [n] or a single one, of the streams of `starts`, [n]."""
    return mix(starts + (_unsigned(positions) + np.uint64(1)) * _STEP)


def _unsigned(numbers: npt.ArrayLike) -> Bits:
    """Return numbers as a uint64 array: arrays wrap around silently, as is meant here; scalars would warn."""
    return np.atleast_1d(np.asarray(numbers, dtype=np.int64)).astype(np.uint64)


def uniforms(bits: Bits) -> npt.NDArray[np.float64]:
    """Return uniform numbers in [0, 1) from 64 random bits each, multiples of 2**-53."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers_below(bits: Bits, bounds: npt.ArrayLike) -> Integers:
    """Return uniform integers in [0, bound) from 64 random bits each; the bias is under bound / 2**64."""
    return (bits % np.asarray(bounds).astype(np.uint64)).astype(np.int64)


def permute(
    places: npt.ArrayLike, size: int, seed: int, purpose: Purpose, stream: npt.ArrayLike = 0
) -> Integers:
    """Evaluate a random permutation of the numbers below `size` at `places`, without storing it.

    A Feistel network on pairs (row, column), with additions in place of exclusive-ors (Black and Rogaway
    2002), permutes a domain that is barely larger than `size`; results outside are permuted again until
    they fall inside, which keeps it a permutation. A round is a table of some sqrt(size) numbers.

    Args:
        places: numbers below `size`, [n].
        size: how many numbers are permuted.
        seed: seed of the run.
        purpose: what the order decides.
        stream: which of many permutations to take, such as that of an epoch; one number or [n].

    Returns:
        The numbers at these places of the order, [n].
    """
    distinct, which = np.unique(np.asarray(stream, dtype=np.int64), return_inverse=True)
    tables = _round_tables(size, seed, purpose, tuple(distinct.tolist()))
    which = np.broadcast_to(which.reshape(np.shape(stream)), np.shape(places))
    result = _feistel(np.asarray(places, dtype=np.int64), tables, which)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], tables, which[outside])
        outside = outside[result[outside] >= size]
    return result


class _RoundTables(NamedTuple):
    """Holds the rounds of several Feistel networks on rows * columns numbers.

    Attributes:
        rows: size of one half.
        columns: size of the other half.
        rounds: what each round adds to a half, by network and by the other half, uint32 [networks, half].
    """

    rows: int
    columns: int
    rounds: list[npt.NDArray[np.uint32]]


@functools.lru_cache(maxsize=16)  # 2.7 MB for an epoch of 190 million proteins
def _round_tables(size: int, seed: int, purpose: Purpose, streams: tuple[int, ...]) -> _RoundTables:
    """Return the networks that permute the numbers below `size`, one for each stream."""
    rows = math.isqrt(size - 1) + 1
    # Only rotations of an even number of rows can be odd permutations: every order is reachable.
    rows += rows % 2
    columns = -(-size // rows)
    keys = stream_starts(seed, purpose, streams)[:, np.newaxis]
    rounds = []
    for step in range(_ROUNDS):
        others, bound = (columns, rows) if step % 2 == 0 else (rows, columns)
        round_keys = bits_at(keys, step)
        hashed = mix(round_keys ^ mix(np.arange(others, dtype=np.uint64) + round_keys))
        rounds.append(integers_below(hashed, bound).astype(np.uint32))
    return _RoundTables(rows, columns, rounds)


def _feistel(numbers: Integers, tables: _RoundTables, which: Integers) -> Integers:
    """Send each number below rows * columns, [n], through the network that `which` names, [n]."""
    row, column = (half.astype(np.uint32) for half in np.divmod(numbers, tables.columns))
    first_column, first_row = which * tables.columns, which * tables.rows
    for step in range(0, _ROUNDS, 2):
        row = _add_below(row, tables.rounds[step].take(first_column + column), tables.rows)
        column = _add_below(column, tables.rounds[step + 1].take(first_row + row), tables.columns)
    return row * np.int64(tables.columns) + column


def _add_below(
    left: npt.NDArray[np.uint32], right: npt.NDArray[np.uint32], bound: int
) -> npt.NDArray[np.uint32]:
    """Return (left + right) % bound for numbers below `bound`."""
    # A difference below 0 wraps around to a large number.
    total = left + right
    return np.minimum(total, total - np.uint32(bound))


class SampleOrder:
    """Orders proteins (or clusters) endlessly: each epoch holds every one of them once, in its own order."""

    def __init__(self, size: int, seed: int) -> None:
        """Fix the order.

        Args:
            size: proteins, or clusters, in an epoch.
            seed: seed of the run.
        """
        if size < 1:
            raise ValueError(f"size={size}: an order needs at least one protein")
        self.size = size
        self.seed = seed

    def __call__(self, samples: npt.ArrayLike) -> tuple[Integers, Integers]:
        """Look up samples.

        Args:
            samples: sample numbers from 0, [n].

        Returns:
            Epoch of each sample and the number of its protein (or cluster), both [n].
        """
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.size)
        return epochs, permute(places, self.size, self.seed, Purpose.ORDER, epochs)


def crop_starts(
    seed: int, samples: npt.ArrayLike, num_tokens: npt.ArrayLike, max_seq_length: int, crop: str = "random"
) -> Integers:
    """Return the first token of the window that is kept of each sample; 0 where everything fits.

    Args:
        seed: seed of the run.
        samples: sample numbers, [n].
        num_tokens: tokens of the whole protein with `<cls>` and `<eos>`, [n].
        max_seq_length: tokens of the window.
        crop: "random" for a start uniform in [0, num_tokens - max_seq_length], both ends included, so
            that the last token can be reached; "start" for 0.

    Returns:
        Start positions [n]. A window inside a protein holds neither `<cls>` nor `<eos>`.
    """
    surplus = np.asarray(num_tokens, dtype=np.int64) - max_seq_length
    starts = np.zeros_like(surplus)
    if crop == "random":
        long = np.flatnonzero(surplus > 0)
        streams = stream_starts(seed, Purpose.CROP, np.asarray(samples)[long])
        starts[long] = integers_below(bits_at(streams, 0), surplus[long] + 1)
    elif crop != "start":
        raise ValueError(f"data.crop={crop!r} is not one of random, start")
    return starts
