"""Collectives of the context-parallel group, through which gradients pass back.

Legend: ``T`` tokens of a pack, ``c`` context-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


class AllToAll:
    """Sends rows to all ranks and takes theirs, from its making until `wait`; in between one can compute.

    On a GPU the host never waits. The backward pass comes to the two ends in reverse: behind `wait` the
    gradients set out, and where the rows set out the gradients are waited for.
    """

    def __init__(self, sent: Tensor, given: Sequence[int], taken: Sequence[int]) -> None:
        """Begin.

        Args:
            sent: Rows for each rank, one after the other: ``[sum(given), …]``.
            given: How many rows each rank gets.
            taken: How many rows come from each rank.
        """
        self.given, self.taken = given, taken
        self._message: _Message | None = None
        self._received: Tensor | None = _Start.apply(sent, self)

    def wait(self) -> Tensor:
        """Return the rows of all ranks, in their order: ``[sum(taken), …]``. It can be called once."""
        received, self._received = self._received, None
        return _Wait.apply(received, self)

    def send(self, rows: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """Let rows or their gradients set out; return what holds those of all ranks after `receive`."""
        self._message = _Message(rows, given, taken)
        return self._message.received

    def receive(self) -> Tensor:
        """Wait for what has set out."""
        message, self._message = self._message, None
        assert message is not None
        return message.wait()


class _Message:
    """Is on its way with the tensors that it needs until it has arrived."""

    def __init__(self, rows: Tensor, given: Sequence[int], taken: Sequence[int]) -> None:
        self._sent = rows.contiguous()
        self.received = rows.new_empty(sum(taken), *rows.shape[1:])
        group = parallel_state.get_context_parallel_group()
        self._work = dist.all_to_all_single(
            self.received, self._sent, list(taken), list(given), group=group, async_op=True
        )

    def wait(self) -> Tensor:
        self._work.wait()
        return self.received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(sent, exchange.given, exchange.taken)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.receive(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive().view_as(received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send(gradients[0], ctx.exchange.taken, ctx.exchange.given)
        # `_Start` does not read it: its gradient is what comes back.
        return gradients[0], None


class _CountedByAll(torch.autograd.Function):
    """Changes nothing, and multiplies the gradient by c: that of what all ranks compute alike."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * parallel_state.get_context_parallel_world_size()


def gather_for_all(own: Tensor) -> Tensor:
    """Give every rank all tokens, with which each computes the same: ``[T/c, …] -> [T, …]``.

    It is an all-gather of the group; the backward pass sends nothing.
    """
    group = parallel_state.get_context_parallel_group()
    return gather_from_sequence_parallel_region(
        _CountedByAll.apply(own), tensor_parallel_output_grad=False, group=group
    )


def gather_for_shares(own: Tensor) -> Tensor:
    """Give every rank all tokens, with which each computes something else: ``[T/c, …] -> [T, …]``.

    It is an all-gather of the group; the backward pass adds up the gradients of all ranks (reduce-scatter).
    """
    return gather_from_sequence_parallel_region(own, group=parallel_state.get_context_parallel_group())


def sum_for_all(own: Tensor) -> Tensor:
    """Add up shares of a result, with which every rank then computes the same; an all-reduce of the group."""
    # Megatron-Core adds up in place, and in contiguous tensors alone.
    copy = _CountedByAll.apply(own).clone(memory_format=torch.contiguous_format)
    return reduce_from_tensor_model_parallel_region(copy, group=parallel_state.get_context_parallel_group())
