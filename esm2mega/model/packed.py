"""Tells the encoder where each sequence of a pack begins, and which tokens get logits.

Legend: ``T`` tokens of a pack, ``m`` of them that get logits, ``n`` sequences in it, ``t`` tensor-parallel
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from esm2mega.model.dropout import token_keys


@dataclass
class PackedSequences(PackedSeqParams):
    """Holds the borders of the sequences of one pack, in the form of Megatron-Core's attention (``thd``).

    A pad tail, where there is one, is a sequence of its own: it attends to itself alone.

    Attributes:
        seqlens: Lengths in tokens, on the host, so that per-sequence kernels need no device synchronisation.
        query_lens: Number of queries of each sequence: all its tokens, except after `at_rows`.
        row_borders: Where the tokens of each sequence that get logits begin among all of these, int32
            ``[n + 1]``; None to find it from `row_counts`.
        row_counts: How many tokens of each sequence get logits, on the host; None if that is not known.
        rows: The tokens that get logits, ascending, int64 ``[m]``, to which the last layer limits itself;
            None for all tokens. Under context parallelism those of this rank, counted within its part.
        host_rows: All tokens that get logits, on the host, which only context parallelism asks for.
        query_keys: 64 random bits for each query, for dropout; int64 ``[T]``, or ``[m]`` after `at_rows`.
            None where nothing is dropped.
        hidden_keys: The same for each token whose hidden states this rank holds: ``[T]``, or a part of them
            under sequence or context parallelism.
        exchange: Under context parallelism, how attention reaches the tokens of other ranks, from
            `esm2mega.model.context_parallel`; else None.
    """

    seqlens: tuple[int, ...] = ()
    query_lens: tuple[int, ...] = ()
    row_borders: Tensor | None = None
    row_counts: tuple[int, ...] | None = None
    rows: Tensor | None = None
    host_rows: npt.NDArray[np.int64] | None = None
    query_keys: Tensor | None = None
    hidden_keys: Tensor | None = None
    exchange: Any = None

    @classmethod
    def from_lengths(
        cls,
        seqlens: Sequence[int],
        device: torch.device | str = "cpu",
        row_counts: Sequence[int] | None = None,
        borders: Tensor | None = None,
        host_rows: npt.NDArray[np.int64] | None = None,
    ) -> PackedSequences:
        """Make the borders of sequences that lie back to back.

        Args:
            seqlens: ``n`` lengths in tokens.
            device: Where to put ``cu_seqlens`` (int32, ``[n + 1]``).
            row_counts: ``n`` numbers of tokens that get logits, if known.
            borders: `esm2mega.batch.host_borders` of both on `device`, if they are there already.
            host_rows: The tokens that get logits, ascending, ``[m]``, if known.
        """
        cu_seqlens = _borders(seqlens, device) if borders is None else borders[0]
        longest = max(seqlens)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            seqlens=tuple(seqlens),
            query_lens=tuple(seqlens),
            row_borders=None if borders is None or row_counts is None else borders[1],
            row_counts=None if row_counts is None else tuple(row_counts),
            host_rows=host_rows,
        )

    def with_rows(self, rows: Tensor) -> PackedSequences:
        """Return this pack with logits at `rows` alone, or unchanged if the last layer could not use that.

        The last layer needs `row_counts`. A pack without any row is rare and stays whole, so that no kernel
        gets an empty tensor.

        Args:
            rows: int64 ``[m]``, ascending.
        """
        if self.row_counts is None or not rows.numel():
            return self
        assert sum(self.row_counts) == rows.numel(), "row_counts are those of other rows"
        return replace(self, rows=rows)

    def with_dropout_keys(self, keys: Tensor) -> PackedSequences:
        """Return this pack with keys of its tokens.

        Args:
            keys: 64 random bits of each of the ``n`` sequences, int64.
        """
        tokens = token_keys(keys.to(self.cu_seqlens_q.device)[self.sequence_ids()], self.positions())
        return replace(self, query_keys=tokens, hidden_keys=tokens)

    def with_share(self, size: int, rank: int) -> PackedSequences:
        """Return this pack as a rank sees it that holds the hidden states of one of `size` parts of it."""
        assert self.hidden_keys is not None
        return replace(self, hidden_keys=self.hidden_keys.chunk(size)[rank])

    def at_rows(self) -> PackedSequences:
        """Return the borders for attention from `rows` to all tokens, with fewer queries than keys."""
        assert self.row_counts is not None
        if self.exchange is not None:
            return replace(self, exchange=self.exchange.at_rows())
        packed = self.with_queries(self.row_counts, self.row_borders)
        if self.query_keys is not None:
            assert self.rows is not None
            packed.query_keys = self.query_keys.index_select(0, self.rows)
        return packed

    def with_queries(self, counts: Sequence[int], borders: Tensor | None = None) -> PackedSequences:
        """Return these sequences with fewer queries than keys, whose dropout keys remain those of all tokens.

        Args:
            counts: ``n`` numbers of queries.
            borders: Where the queries of each sequence begin, int32 ``[n + 1]``; None to find it.
        """
        packed = replace(self, query_lens=tuple(counts))
        packed.cu_seqlens_q = _borders(counts, self.cu_seqlens_q.device) if borders is None else borders
        packed.max_seqlen_q = max(counts)
        return packed

    @property
    def num_tokens(self) -> int:
        return sum(self.seqlens)

    def sequence_ids(self) -> Tensor:
        """Return which sequence each token belongs to: int64 ``[T]``, on the device of ``cu_seqlens``."""
        lengths = self.cu_seqlens_q.diff().long()
        numbers = torch.arange(len(self.seqlens), device=lengths.device)
        # output_size spares the device synchronisation that finding the sum would cost.
        return torch.repeat_interleave(numbers, lengths, output_size=self.num_tokens)

    def positions(self) -> Tensor:
        """Return the position of each token within its sequence, from 0: int64 ``[T]``."""
        starts = self.cu_seqlens_q[:-1].long()
        return torch.arange(self.num_tokens, device=starts.device) - starts[self.sequence_ids()]


def _borders(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Return where each sequence begins, and where the last one ends: int32 ``[n + 1]``."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
