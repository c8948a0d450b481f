"""Computes dropout as a pure function of sample number and channel: equal at every layout and after a resume.

A generator would give other masks to each rank and at each micro-batch size. Here an element is dropped by a
hash of the protein's key (which comes from seed and sample number, see `esm2mega.data.counter_rng`), of the
number of its row in the protein, and of its channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The constants of splitmix64, see `esm2mega.data.counter_rng`, as signed integers, since PyTorch's int64 is.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)

_CHANNELS_PER_LAYER = 1 << 32


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
        rows = keys if positions is None else _mix(keys + (positions + 1) * _STEP)
        channels = torch.arange(values.shape[1], device=values.device) + self.layer * _CHANNELS_PER_LAYER + 1
        # [rows, channels]: 53 random bits each
        bits = _shifted(_mix(rows[:, None] + channels * _STEP), 11)
        keep = bits >= int(self.p * 2.0**53)
        return values * keep.to(values.dtype) / (1.0 - self.p)


def _mix(state: Tensor) -> Tensor:
    """Compute `esm2mega.data.counter_rng.mix` on int64 tensors, whose products wrap around."""
    state = (state ^ _shifted(state, 30)) * _MULTIPLIER_1
    state = (state ^ _shifted(state, 27)) * _MULTIPLIER_2
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; the operator on signed numbers would repeat the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
