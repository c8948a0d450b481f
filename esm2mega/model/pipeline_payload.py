"""Sends values through a pipeline together with the hidden states, as further rows of the same tensor.

A schedule sends one tensor from stage to stage, and its gradient back. Values are fp32 at least; where states
are bf16 or fp16, the values' bits are sent, so nothing is rounded on the way. Nothing is computed with these
rows between two stages.

Legend: ``r`` rows of hidden states of this rank, ``c`` carried rows, ``h`` hidden size, ``V`` values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def carried_dtype(states: torch.dtype) -> torch.dtype:
    """Return the dtype of values that are sent with hidden states of dtype `states`."""
    return torch.promote_types(states, torch.float32)


def carried_rows(count: int, hidden_size: int, states: torch.dtype) -> int:
    """Return how many rows `count` values take when sent with hidden states of dtype `states`: ``c``."""
    return -(-count * carried_dtype(states).itemsize // (hidden_size * states.itemsize))


def append(hidden_states: Tensor, values: Tensor, rows: int) -> Tensor:
    """Append values to hidden states for the next stage: ``[r, 1, h]`` and ``[V]`` to ``[r + c, 1, h]``.

    Args:
        hidden_states: Output of this stage.
        values: Values to send, of `carried_dtype`.
        rows: c, at least the values' `carried_rows`; the rest is filled with zeros.
    """
    return _Attach.apply(hidden_states, values, rows)


def split(received: Tensor, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Undo `append`: ``[r + c, 1, h]`` to ``[r, 1, h]`` and ``[V]``.

    Args:
        received: What the previous stage sent.
        count: V.
        rows: c.
    """
    return _Detach.apply(received, count, rows)


def _joined(hidden_states: Tensor, values: Tensor, rows: int) -> Tensor:
    bits = values.contiguous().view(hidden_states.dtype)
    tail = hidden_states.new_zeros(rows, *hidden_states.shape[1:])
    tail.view(-1)[: len(bits)] = bits
    return torch.cat((hidden_states, tail))


def _split(joined: Tensor, count: int, rows: int) -> tuple[Tensor, Tensor]:
    states, tail = joined.split((len(joined) - rows, rows))
    dtype = carried_dtype(joined.dtype)
    # Copies, because a view as the wider dtype needs an aligned start.
    bits = tail.flatten()[: count * dtype.itemsize // joined.dtype.itemsize].clone()
    return states.clone(), bits.view(dtype)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, values: Tensor, rows: int) -> Tensor:
        ctx.count, ctx.rows = len(values), rows
        return _joined(hidden_states, values, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_split(gradients[0], ctx.count, ctx.rows), None


class _Detach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, count: int, rows: int) -> tuple[Tensor, Tensor]:
        ctx.rows = rows
        return _split(received, count, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        states, values = gradients
        return _joined(states, values, ctx.rows), None, None
