"""Computes dropout as a pure function of sample number, place and channel, the same at every layout.

A generator would give other masks to each rank and at each micro-batch size. Here an element is dropped by a
hash. In the head of a task it is one of the protein's key (which comes from seed and sample number, see
`esm2mega.data.counter_rng`), of the number of its row in the protein, and of its channel.

In the encoder the hash is taken in steps, of which only the last one is computed for every element:

    key of a piece     of seed, sample number, and the number of the piece's first token in its protein
    key of a token     of the key of its piece, and its position in that
    key of a row       of the key of its token, the layer, and the place in the layer; for probabilities of
                       attention the token is the query, and each head is a place of its own, as is each
                       linear with an adapter
    64 bits            of the key of a row; four elements share them, 16 bits each
"""

from __future__ import annotations

import torch
from torch import Tensor

# The constants of splitmix64, see `esm2mega.data.counter_rng`, as signed integers, since PyTorch's int64 is.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)

_CHANNELS_PER_LAYER = 1 << 32
_PLACES_PER_LAYER = 1 << 20

_LEVELS = 1 << 16
"""Counts the values of 16 bits."""

_BLOCK = {"cpu": 1 << 16, "other": 1 << 24}
"""Limits the hashes that are computed at a time: on a CPU to what its caches hold, else to 128 MB."""

EMBEDDING, ATTENTION_OUTPUT, MLP_OUTPUT, FIRST_HEAD = range(4)
"""Number the places of a layer where the encoder drops; head n, counted from 0, is `FIRST_HEAD` + n."""

FIRST_ADAPTER = _PLACES_PER_LAYER // 2
"""Is the first of the places of a layer where inputs of adapters are dropped, see `esm2mega.lora.dropout`."""


class KeyedDropout(torch.nn.Module):
    """Zeroes elements with probability `p` in training, and scales the others by 1 / (1 - p)."""

    def __init__(self, p: float, layer: int = 0) -> None:
        """Set the probability.

        Args:
            p: Probability to drop an element, in [0, 1).
            layer: Number that tells the dropouts of one head apart.
        """
        super().__init__()
        self.p, self.layer = p, layer

    def forward(self, values: Tensor, keys: Tensor, positions: Tensor | None = None) -> Tensor:
        """Drop elements.

        Args:
            values: ``[rows, channels]``.
            keys: Random 64 bits of each row's protein, int64 ``[rows]``.
            positions: Number of each row within its protein, int64 ``[rows]``; None if a protein has one row.
        """
        if not self.training or not self.p:
            return values
        rows = keys if positions is None else token_keys(keys, positions)
        channels = torch.arange(values.shape[1], device=values.device) + self.layer * _CHANNELS_PER_LAYER + 1
        # [rows, channels]: 53 random bits each
        bits = _shifted(_mix(rows[:, None] + channels * _STEP), 11)
        keep = bits >= int(self.p * 2.0**53)
        return values * keep.to(values.dtype) / (1.0 - self.p)


def token_keys(keys: Tensor, positions: Tensor) -> Tensor:
    """Return 64 random bits for each token.

    Args:
        keys: Those of each token's piece, int64 ``[T]``.
        positions: Number of each token within its piece, from 0, int64 ``[T]``.
    """
    return _mix(keys + (positions + 1) * _STEP)


def place_of(layer_number: int, place: int) -> int:
    """Number a place of the encoder, such as `ATTENTION_OUTPUT`; layers count from 1, the embedding is 0."""
    return layer_number * _PLACES_PER_LAYER + place


def drop(values: Tensor, p: float, keys: Tensor, place: int | Tensor, first: int = 0) -> Tensor:
    """Zero elements of the encoder with probability `p`, and scale the others so that the mean stays.

    Args:
        values: ``[*, c]``.
        p: Probability above 0 and below 1; taken as a multiple of 1 / 65536, and as that at least.
        keys: Keys of the tokens of the rows, int64; its shape, together with that of `place`, gives ``[*]``.
        place: Number of the place from `place_of`, or several of them.
        first: Number of the first channel of `values` among those of all tensor-parallel ranks.
    """
    level = max(1, round(p * _LEVELS))
    kept = values.masked_fill(_dropped(keys, place, first, values.shape[-1], level), 0.0)
    return kept.mul_(_LEVELS / (_LEVELS - level))


def _dropped(keys: Tensor, place: int | Tensor, first: int, count: int, level: int) -> Tensor:
    """Decide for `count` elements of each row, with probability level / 65536: bool ``[*, count]``."""
    # A scalar tensor on the CPU: its product wraps around, unlike that of Python's integers.
    rows = _mix(keys + (torch.as_tensor(place) + 1) * _STEP)
    # Four channels share a hash; those of this rank may begin and end within one.
    begin, end = first // 4, -(-(first + count) // 4)
    steps = torch.arange(begin + 1, end + 1, device=keys.device) * _STEP
    mine = slice(first - 4 * begin, first - 4 * begin + count)
    size = max(1, _BLOCK["cpu" if keys.device.type == "cpu" else "other"] // len(steps))
    dropped = torch.empty(rows.numel(), count, dtype=torch.bool, device=keys.device)
    for block, result in zip(rows.flatten().split(size), dropped.split(size), strict=True):
        bits = _mix(block[:, None] + steps).view(torch.int16)[:, mine]
        torch.lt(bits, level - _LEVELS // 2, out=result)
    return dropped.view(*rows.shape, count)


def _mix(state: Tensor) -> Tensor:
    """Compute `esm2mega.data.counter_rng.mix` on int64 tensors, whose products wrap around."""
    # In place after the first step, since the masks of attention are large.
    state = (state ^ _shifted(state, 30)).mul_(_MULTIPLIER_1)
    state = state.bitwise_xor_(_shifted(state, 27)).mul_(_MULTIPLIER_2)
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; the operator on signed numbers would repeat the sign."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
