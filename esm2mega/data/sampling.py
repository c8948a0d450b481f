"""Which protein is sample k, and every random number of the data pipeline, as pure functions of (seed, k).

There are no generator objects and no state: a random number is a hash of (seed, purpose, stream, position),
and the order of an epoch is a keyed permutation that is evaluated, not stored. So any rank can compute any
sample at once, for whole arrays, in constant memory, and a resumed run only needs to know how far it was.

The hash is splitmix64 (Steele, Lea, Flood 2014): the numbers of one stream are the outputs of that
generator, whose 64-bit start is hashed from seed, purpose and stream number. Two streams share numbers only
if their starts lie within reach on its cycle of 2**64 states: with 10**12 samples of 1024 tokens, one
sample in 10,000 meets another one in some place.

    stream     the sample number k in training, the number of the sequence in evaluation
    position   place within the stream, such as the token within the cropped protein
"""

from __future__ import annotations

import enum
import functools
import math

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
    """What a random number decides; each purpose has its own numbers. A changed value changes every run."""

    ORDER = 1
    PACK_ORDER = 2
    CROP = 3
    MASK = 4
    RESIDUE = 5
    SPLIT = 6
    EVALUATION = 7


def mix(state: Bits) -> Bits:
    """The output function of splitmix64, a bijection of 64-bit numbers, element by element."""
    state = (state ^ (state >> _SHIFT_1)) * _MULTIPLIER_1
    state = (state ^ (state >> _SHIFT_2)) * _MULTIPLIER_2
    return state ^ (state >> _SHIFT_3)


@functools.lru_cache(maxsize=64)
def derive_seed(seed: int, purpose: Purpose) -> int:
    """A seed of its own for one purpose, from the seed of the run; any Python integer is a valid seed."""
    # Hashed twice, so that neighbouring seeds do not give the shifted keys of neighbouring purposes.
    state = mix(np.array([seed % 2**64], dtype=np.uint64) + _STEP)
    return int(bits_at(state, purpose)[0])


def stream_starts(seed: int, purpose: Purpose, streams: npt.ArrayLike) -> Bits:
    """The start states of streams; `bits_at` gives their numbers.

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
    """64 random bits at `positions` (from 0), [n] or a single one, of streams with these starts, [n]."""
    return mix(starts + (_unsigned(positions) + np.uint64(1)) * _STEP)


def _unsigned(numbers: npt.ArrayLike) -> Bits:
    """Numbers as uint64 of at least one dimension: arrays wrap around as meant here, scalars would warn."""
    return np.atleast_1d(np.asarray(numbers, dtype=np.int64)).astype(np.uint64)


def uniforms(bits: Bits) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) from 64 random bits each, multiples of 2**-53."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers_below(bits: Bits, bounds: npt.ArrayLike) -> Integers:
    """Uniform integers in [0, bound) from 64 random bits each; the bias is under bound / 2**64."""
    return (bits % np.asarray(bounds).astype(np.uint64)).astype(np.int64)


def permute(
    places: npt.ArrayLike, size: int, seed: int, purpose: Purpose, stream: npt.ArrayLike = 0
) -> Integers:
    """A random permutation of the numbers below `size`, evaluated at `places` without storing it.

    A Feistel network on pairs (row, column), with additions in place of exclusive-ors (Black and Rogaway
    2002), permutes a domain that is barely larger than `size`; results outside are permuted again until
    they fall inside, which keeps it a permutation.

    Args:
        places: numbers below `size`, [n].
        size: how many numbers are permuted.
        seed: seed of the run.
        purpose: what the order decides.
        stream: which of many permutations, such as the epoch; one number or [n].

    Returns:
        The numbers at these places of the order, [n].
    """
    rows = math.isqrt(size - 1) + 1
    rows += (
        rows % 2
    )  # only rotations of an even number of rows can be odd permutations: every order is reachable
    columns = -(-size // rows)
    keys = np.broadcast_to(stream_starts(seed, purpose, stream), np.shape(places))
    result = _feistel(np.asarray(places, dtype=np.int64), rows, columns, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], rows, columns, keys[outside])
        outside = outside[result[outside] >= size]
    return result


def _feistel(numbers: Integers, rows: int, columns: int, keys: Bits) -> Integers:
    """Permutes the numbers below rows * columns, [n], one permutation for each of the keys [n]."""
    row, column = np.divmod(numbers, columns)
    for step in range(0, _ROUNDS, 2):
        row = (row + _round(column, keys, step, rows)) % rows
        column = (column + _round(row, keys, step + 1, columns)) % columns
    return row * columns + column


def _round(half: Integers, keys: Bits, step: int, bound: int) -> Integers:
    """A random function of one half of the number, its key and the round: values below `bound`, [n]."""
    round_keys = bits_at(keys, step)
    return integers_below(mix(round_keys ^ mix(half.astype(np.uint64) + round_keys)), bound)


class SampleOrder:
    """The endless sequence of training samples: each epoch holds every protein once, in its own order."""

    def __init__(self, num_sequences: int, seed: int) -> None:
        """Fixes the order.

        Args:
            num_sequences: proteins in the store.
            seed: seed of the run.
        """
        if num_sequences < 1:
            raise ValueError(f"num_sequences={num_sequences}: an order needs at least one sequence")
        self.num_sequences = num_sequences
        self.seed = seed

    def __call__(self, samples: npt.ArrayLike) -> tuple[Integers, Integers]:
        """Looks up samples.

        Args:
            samples: sample numbers from 0, [n].

        Returns:
            Epoch of each sample and index of its protein in the store, both [n].
        """
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.num_sequences)
        return epochs, permute(places, self.num_sequences, self.seed, Purpose.ORDER, epochs)


def crop_starts(
    seed: int, samples: npt.ArrayLike, num_tokens: npt.ArrayLike, max_seq_length: int, crop: str = "random"
) -> Integers:
    """First token of the window that is kept of each sample; 0 where everything fits.

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
    surplus = np.maximum(np.asarray(num_tokens, dtype=np.int64) - max_seq_length, 0)
    if crop == "start":
        return np.zeros_like(surplus)
    if crop != "random":
        raise ValueError(f"data.crop={crop!r} is not one of random, start")
    return integers_below(bits_at(stream_starts(seed, Purpose.CROP, samples), 0), surplus + 1)
