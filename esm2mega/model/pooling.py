"""Pools the hidden states of each protein to one vector, independently of the others in the pack.

Legend: ``T`` tokens of a pack, ``h`` hidden size, ``n`` proteins and ``R`` residues of the pack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esm2mega.batch import Segments


def mean_of_residues(hidden_states: Tensor, segments: Segments) -> Tensor:
    """Average over residues, without `<cls>` and `<eos>`: ``[T, h] -> [n, h]``. Sums are at least fp32."""
    ones = torch.ones_like(segments.owners, dtype=torch.float64)
    counts = ones.new_zeros(segments.num_proteins).index_add(0, segments.owners, ones)
    return _weighted_sum(residue_states(hidden_states, segments), segments, 1.0 / counts[segments.owners])


def first_tokens(hidden_states: Tensor, segments: Segments) -> Tensor:
    """Return the state of each `<cls>`: ``[T, h] -> [n, h]``."""
    return hidden_states.index_select(0, segments.first)


def max_of_residues(hidden_states: Tensor, segments: Segments) -> Tensor:
    """Return the largest value of each channel over the residues: ``[T, h] -> [n, h]``."""
    states = residue_states(hidden_states, segments)
    owners = segments.owners[:, None].expand_as(states)
    empty = states.new_full((segments.num_proteins, states.shape[1]), -torch.inf)
    return empty.scatter_reduce(0, owners, states, "amax", include_self=True)


def residue_states(hidden_states: Tensor, segments: Segments) -> Tensor:
    """Return the states of the residues alone: ``[T, h] -> [R, h]``."""
    return hidden_states.index_select(0, segments.residues)


def attention_over_residues(states: Tensor, segments: Segments, query: Tensor) -> Tensor:
    """Average with softmax weights of each state's product with `query`, ``[h]``: ``[R, h] -> [n, h]``."""
    scores = (states @ query).to(torch.promote_types(states.dtype, torch.float32))
    peaks = scores.new_full((segments.num_proteins,), -torch.inf)
    peaks = peaks.scatter_reduce(0, segments.owners, scores.detach(), "amax")
    weights = (scores - peaks[segments.owners]).exp()
    totals = weights.new_zeros(segments.num_proteins).index_add(0, segments.owners, weights)
    return _weighted_sum(states, segments, weights / totals[segments.owners])


def _weighted_sum(states: Tensor, segments: Segments, weights: Tensor) -> Tensor:
    """Sum up each protein's residues times weights, ``[R]``: ``[R, h] -> [n, h]``."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    weighted = wide * weights.to(wide.dtype)[:, None]
    sums = weighted.new_zeros(segments.num_proteins, states.shape[1])
    return sums.index_add(0, segments.owners, weighted).to(states.dtype)
