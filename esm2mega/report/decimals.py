"""Writes metrics with as many decimals as a reader needs."""

from __future__ import annotations

_LEAST = 1e-3
"""Is the magnitude below which four decimals hold less than two digits."""


def four_decimals(value: float) -> str:
    """Write a number with four decimals, or with four digits if it is too small for that.

    The squared error of constants in mol/l would be 0.0000 otherwise.
    """
    return f"{value:.4f}" if value == 0 or abs(value) >= _LEAST else f"{value:.4g}"
