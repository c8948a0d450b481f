"""Lets the ranks of a context-parallel group attend to each other's tokens: one pack, cut into equal parts.

Rank r of c holds the hidden states of the tokens ``r * T / c`` up to the next rank's. All of them know the
token ids and the borders of the whole pack, so positions, masks and dropout are what they are in one process.
Only attention looks beyond a part, and there are two ways to let it, one of them with a variant:

heads     Every rank gets all tokens, for one part of the heads, and gives the results back (all-to-all).
needed    Every rank gets the keys and values of those tokens that its own attend to: the rest of the protein
          that its part begins within, and the rest of the one that it ends within. ``gather`` is the same
          with the keys and values of all tokens.

Half of the heads are exchanged while the other half attends.

Heads and losses see the whole pack on every rank, and compute the same there. A gradient on its way back from
what every rank has computed is therefore multiplied by c, without being sent, in place of a sum over c equal
ones; so the sum over the group, which Megatron-Core takes of all gradients of weights together with that over
data-parallel ranks, counts every label c times, in the sums as in the number that these are divided by.

Legend: ``T`` tokens of a pack, ``c`` context-parallel size, ``t`` tensor-parallel size, ``n`` heads, ``d``
head dimension, ``K`` tokens whose keys a rank gets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import pad

from esm2mega.batch import host_borders
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.context_collectives import AllToAll, sum_for_all
from esm2mega.parcel import Parcel

Attend = Callable[[Tensor, Tensor, Tensor, PackedSequences, int], Tensor]
"""Takes q, k and v of some heads, their borders, and the number of the first head, and attends."""


@dataclass(frozen=True)
class OwnRows:
    """Says which of the tokens that get logits are in this rank's part; they follow each other.

    Attributes:
        first: How many of them lie in the parts before.
        counts: How many each rank has; m in all.
        queries: How many each sequence has in this part, of all sequences of the pack.
        rows: Where they are in this part, int64 ``[counts[rank]]``.
    """

    first: int
    counts: tuple[int, ...]
    queries: tuple[int, ...]
    rows: Tensor


@dataclass(frozen=True)
class HeadExchange:
    """Gives every rank all tokens of ``n / (t * c)`` heads.

    Attributes:
        packed: Borders of the whole pack.
        size: c.
        rank: Which part this rank has.
        own_rows: Tokens that get logits, if the last layer limits itself to them.
        query_counts: How many queries each rank has in this layer; None for all its tokens.
    """

    packed: PackedSequences
    size: int
    rank: int
    own_rows: OwnRows | None = None
    query_counts: tuple[int, ...] | None = None

    def at_rows(self) -> HeadExchange:
        """Return the exchange of the last layer, whose queries are those of `own_rows`."""
        assert self.own_rows is not None
        return replace(self, packed=self.packed.at_rows(), query_counts=self.own_rows.counts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, first_head: int, kernel: Attend) -> Tensor:
        """Attend: q ``[T/c, n/t, d]``, or those of `own_rows`, k and v ``[T/c, n/t, d]`` -> as q.

        All-to-alls of the context-parallel group send q, k and v there, and the results back.

        Args:
            query: Those of this rank's tokens, as `key` and `value`.
            key: Rotated, as `query`.
            value: As projected.
            first_head: Number of the first of these heads among all.
            kernel: What attends.
        """
        own, heads, channels = query.shape
        each = heads // self.size
        counts = self.query_counts or (own,) * self.size
        turns = _turns(each)
        sent: list[tuple[AllToAll, ...]]
        if self.query_counts is None:
            sent = [(self._by_heads((query, key, value), turn, counts),) for turn in turns]
        else:
            sent = [
                (self._by_heads((query,), turn, counts), self._by_heads((key, value), turn)) for turn in turns
            ]
        returned = []
        for turn, arriving in zip(turns, sent, strict=True):
            q, k, v = (part for exchange in arriving for part in exchange.wait().unbind(dim=1))
            context = kernel(q, k, v, self.packed, first_head + self.rank * each + turn.start)
            # [queries of all, n/tc, d] -> [c * own, n/tc, d]
            returned.append(AllToAll(context, counts, (own,) * self.size))
        # [own, c, n/tc, d]
        by_ranks = [
            exchange.wait().view(self.size, own, turn.stop - turn.start, channels).transpose(0, 1)
            for turn, exchange in zip(turns, returned, strict=True)
        ]
        return torch.cat(by_ranks, dim=2).view(own, heads, channels)

    def _by_heads(
        self, own: tuple[Tensor, ...], turn: slice, counts: tuple[int, ...] | None = None
    ) -> AllToAll:
        """Begin to exchange k tensors ``[own, n/t, d]`` of this rank's tokens for ``[all, k, n/tc, d]``.

        Args:
            own: Several values of each token.
            turn: Which of the heads of each rank.
            counts: How many tokens each rank has; None for equally many.
        """
        tokens, heads, channels = own[0].shape
        parts = (x.view(tokens, self.size, heads // self.size, channels)[:, :, turn] for x in own)
        # [c, own, k, n/tc, d]
        sent = torch.stack([part.transpose(0, 1) for part in parts], dim=2).flatten(0, 1)
        return AllToAll(sent, (tokens,) * self.size, counts or (tokens,) * self.size)


@dataclass(frozen=True)
class KeyExchange:
    """Gives every rank the keys and values that its own tokens attend to.

    Attributes:
        packed: Borders of the sequences of these keys, and of the queries of this rank in them.
        given: Which of this rank's tokens each rank gets.
        taken: How many tokens this rank gets of each; in the order of the ranks they lie side by side.
        own_rows: Tokens that get logits, if the last layer limits itself to them.
    """

    packed: PackedSequences
    given: tuple[slice, ...]
    taken: tuple[int, ...]
    own_rows: OwnRows | None = None

    def at_rows(self) -> KeyExchange:
        """Return the exchange of the last layer, whose queries are those of `own_rows`."""
        return replace(self, packed=self.packed.at_rows())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, first_head: int, kernel: Attend) -> Tensor:
        """Attend as `HeadExchange.attend` does; all-to-alls of the group send keys and values together."""
        turns = _turns(query.shape[1])
        sizes = [rows.stop - rows.start for rows in self.given]
        sent = [
            # [T/c, 2, n/t, d] -> [K, 2, n/t, d]
            AllToAll(
                _Pick.apply(torch.stack((key[:, turn], value[:, turn]), dim=1), self.given), sizes, self.taken
            )
            for turn in turns
        ]
        contexts = []
        for turn, arriving in zip(turns, sent, strict=True):
            keys, values = arriving.wait().unbind(dim=1)
            contexts.append(kernel(query[:, turn], keys, values, self.packed, first_head + turn.start))
        return torch.cat(contexts, dim=1)


def _turns(heads: int) -> list[slice]:
    """Divide heads in two, so that one half attends while the other, or its results, are on their way."""
    half = heads // 2
    return [slice(0, half), slice(half, heads)] if half else [slice(0, heads)]


Exchange = HeadExchange | KeyExchange


def own_part(values: Tensor, config: Any, dim: int = 0) -> Tensor:
    """Return this rank's part of what it has for all tokens: ``[T, …] -> [T/c, …]``.

    Args:
        values: For each token.
        config: Configuration of the model.
        dim: The dimension of the tokens.
    """
    size = config.context_parallel_size
    return values if size == 1 else values.chunk(size, dim)[parallel_state.get_context_parallel_rank()]


def in_parts(packed: PackedSequences, config: Any) -> PackedSequences:
    """Return a pack as a rank sees it that holds a part of it: with an exchange, and its own rows if any.

    It is planned on the host, which has all lengths and the places of the labels.

    Args:
        packed: The whole pack, with dropout keys of all queries if any.
        config: Configuration of the model.
    """
    size, rank = config.context_parallel_size, parallel_state.get_context_parallel_rank()
    borders = [0, *accumulate(packed.seqlens)]
    own_rows = None
    if packed.rows is not None:
        own_rows = _own_rows(packed, borders, size, rank)
        if not all(own_rows.counts):
            # The layer would get an empty tensor on a rank without labels: it stays whole on all ranks.
            packed, own_rows = replace(packed, rows=None), None
    if config.context_exchange == "heads":
        exchange: Exchange = HeadExchange(packed, size, rank, own_rows)
    else:
        exchange = _key_exchange(packed, borders, size, rank, config.context_exchange == "gather", own_rows)
    return replace(packed, exchange=exchange, rows=None if own_rows is None else own_rows.rows)


def _own_rows(packed: PackedSequences, borders: Sequence[int], size: int, rank: int) -> OwnRows:
    # Whoever gives row counts under context parallelism gives these too, see `ESM2Model.forward`.
    assert packed.host_rows is not None and packed.rows is not None
    part = packed.num_tokens // size
    limits = np.searchsorted(packed.host_rows, np.arange(size + 1) * part).tolist()
    first, last = limits[rank : rank + 2]
    own = packed.host_rows[first:last]
    queries = np.diff(np.searchsorted(own, borders)).tolist()
    counts = tuple(end - start for start, end in pairwise(limits))
    return OwnRows(first, counts, tuple(queries), packed.rows[first:last] - rank * part)


def _key_exchange(
    packed: PackedSequences,
    borders: Sequence[int],
    size: int,
    rank: int,
    everything: bool,
    own_rows: OwnRows | None,
) -> KeyExchange:
    part = packed.num_tokens // size
    spans = [_span(borders, r * part, (r + 1) * part, everything) for r in range(size)]
    start, end = rank * part, (rank + 1) * part
    wanted = [_overlap(*span, start, end) for span in spans]
    given = tuple(slice(tokens.start - start, tokens.stop - start) for tokens in wanted)
    first, last = spans[rank]
    taken = tuple(len(_overlap(first, last, r * part, (r + 1) * part)) for r in range(size))
    inside = range(bisect_left(borders, first), bisect_left(borders, last))
    local = _between(packed, borders, inside, start, end, own_rows)
    return KeyExchange(local, given, taken, own_rows)


def _overlap(first: int, last: int, start: int, end: int) -> range:
    """Return what two stretches of a pack have in common; an empty range if they have nothing."""
    begin = max(first, start)
    return range(begin, max(begin, min(last, end)))


def _span(borders: Sequence[int], start: int, end: int, everything: bool) -> tuple[int, int]:
    """Return from where to where the sequences reach that have tokens in a part."""
    if everything:
        return 0, borders[-1]
    return borders[bisect_right(borders, start) - 1], borders[bisect_left(borders, end)]


def _between(
    packed: PackedSequences,
    borders: Sequence[int],
    inside: range,
    start: int,
    end: int,
    own_rows: OwnRows | None,
) -> PackedSequences:
    """Return the borders of the sequences `inside`, with queries from `start` to `end`."""
    lengths = [borders[number + 1] - borders[number] for number in inside]
    queries = [len(_overlap(borders[number], borders[number + 1], start, end)) for number in inside]
    rows = [0] * len(queries) if own_rows is None else [own_rows.queries[number] for number in inside]
    device = packed.cu_seqlens_q.device
    (on_device,) = Parcel.of([torch.cat([host_borders(lengths, queries), host_borders(rows)])]).to(device)
    local = PackedSequences.from_lengths(lengths, device, borders=on_device)
    local = local.with_queries(queries, on_device[1])
    keys = packed.query_keys
    local.query_keys = None if keys is None else keys[start:end]
    if own_rows is not None:
        local.rows, local.row_counts, local.row_borders = own_rows.rows, tuple(rows), on_device[2]
    return local


class _Pick(torch.autograd.Function):
    """Puts the rows side by side that each rank gets, some of them several times: ``[T/c, …] -> [given, …]``.

    The backward pass adds up the gradients of each row, in one tensor.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, given: Sequence[slice]) -> Tensor:
        ctx.given, ctx.length = given, len(own)
        return torch.cat([own[rows] for rows in given])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.length, *gradients[0].shape[1:])
        pieces = gradients[0].split([rows.stop - rows.start for rows in ctx.given])
        for rows, piece in zip(ctx.given, pieces, strict=True):
            total[rows] += piece
        return total, None


def rows_for_all(own: Tensor, packed: PackedSequences) -> Tensor:
    """Give every rank the hidden states of the tokens that get logits: ``[own, …] -> [m, …]``.

    Each is on one rank, and the others add zeros, which changes nothing (an all-reduce of the group).

    Args:
        own: Those of this rank's part.
        packed: From `in_parts`, with rows.
    """
    own_rows = packed.exchange.own_rows
    behind = sum(own_rows.counts) - own_rows.first - len(own)
    return sum_for_all(pad(own, [0, 0] * (own.dim() - 1) + [own_rows.first, behind]))


def chosen_for_all(own: Tensor, rows: Tensor) -> Tensor:
    """Give every rank some of the tokens: ``[T/c, …] -> [m, …]``, as `rows_for_all`, from all of them.

    Neither shapes nor sizes depend on where the tokens are, and nobody waits for the device.

    Args:
        own: This rank's part.
        rows: Positions in the whole pack, int64 ``[m]``.
    """
    length = own.shape[0]
    place = rows - parallel_state.get_context_parallel_rank() * length
    is_own = (place >= 0) & (place < length)
    chosen = own.index_select(0, place.clamp(0, length - 1))
    return sum_for_all(chosen.masked_fill(~is_own.view(-1, *[1] * (own.dim() - 1)), 0.0))
