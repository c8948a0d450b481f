"""Computes ESM-2's contacts: a logistic regression on attention maps, which is summed up layer by layer.

Legend: ``n`` heads, ``L`` layers, ``t`` tensor-parallel size, ``c`` context-parallel size, ``d`` head
dimension, ``l`` residues of a sequence, ``s`` its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from esm2mega.model.contact_tiles import ContactTiles, add_layer
from esm2mega.parallel.context_collectives import gather_for_shares

_MAP_ELEMENTS = 1 << 24
"""Limits the elements of attention maps held at once: 64 MB in fp32, or one map if it is larger."""


@dataclass(frozen=True)
class Span:
    """Says where a sequence lies in a pack.

    Attributes:
        start: Index of its first token in the pack.
        num_tokens: Number of its tokens, ``s``.
        residues: Which of its tokens are residues.
    """

    start: int
    num_tokens: int
    residues: slice


NewTiles = Callable[[int, torch.dtype, torch.device], ContactTiles]
"""Makes the sum of a long protein from its residues, dtype and device."""


class ContactMaps:
    """Sums up the regression's logits over the heads of this rank while a pack passes through the layers.

    The part of each map that belongs to residues is symmetrised and corrected by its average product (APC).
    The regression is a sum over maps, so maps are never kept: only one ``[l, l]`` sum per sequence remains.
    Where gradients are wanted, the maps are computed again in the backward pass, one sequence at a time. The
    sum of a sequence of which one map is too large to be held may be kept in tiles.

    Context-parallel ranks divide the heads among each other, whatever the exchange of their attention.

    Attributes:
        sums: What the layers so far have added, one for each sequence: ``[l, l]``, or `ContactTiles`.
    """

    def __init__(self, layers: Iterable[Any], new_tiles: NewTiles | None = None) -> None:
        """Register hooks.

        Args:
            layers: This rank's transformer layers.
            new_tiles: Makes the sum of a long sequence; None to hold every sum in memory, as gradients need.
        """
        self._weights: Mapping[int, Tensor] = {}
        self._spans: Sequence[Span] = ()
        self._new_tiles = new_tiles
        self.sums: list[Any] = []
        self._handles = [
            layer.self_attention.core_attention.register_forward_pre_hook(
                self._hook(layer.layer_number), with_kwargs=True
            )
            for layer in layers
        ]

    def begin(self, spans: Sequence[Span], weights: Mapping[int, Tensor]) -> None:
        """Start a pack.

        Args:
            spans: Its sequences, without pad tails.
            weights: Weights of the regression for the heads of each layer, ``[n]``, by `layer_number`, which
                counts from 1.
        """
        self._spans, self._weights, self.sums = spans, weights, []

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer_number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._weights:
                self._add(*_own_heads(args[0], args[1], self._weights[layer_number], module.config))

        return hook

    def _add(self, query: Tensor, key: Tensor, weight: Tensor) -> None:
        """Add the maps of this rank's heads of one layer, from `_own_heads`."""
        # At least fp32 from here on, in any model.
        dtype = torch.promote_types(query.dtype, torch.float32)
        own = weight.to(query.device, dtype)
        for number, span in enumerate(self._spans):
            tokens = slice(span.start, span.start + span.num_tokens)
            # [s, n/t, d] -> [n/t, s, d]
            q, k = (x[tokens].transpose(0, 1).to(dtype) for x in (query, key))
            if self._new_tiles is not None and is_long(span):
                if number == len(self.sums):
                    length = span.residues.stop - span.residues.start
                    self.sums.append(self._new_tiles(length, dtype, query.device))
                add_layer(self.sums[number], q, k, own, span.residues)
                continue
            if torch.is_grad_enabled() and (own.requires_grad or q.requires_grad):
                logits = checkpoint(
                    _weighted_maps, q, k, own, span.residues, use_reentrant=False, preserve_rng_state=False
                )
                assert isinstance(logits, Tensor)
            else:
                logits = _weighted_maps(q, k, own, span.residues)
            if number == len(self.sums):
                self.sums.append(logits)
            else:
                self.sums[number] += logits


def is_long(span: Span) -> bool:
    """Return whether one attention map of a sequence has more elements than are held at once."""
    return (span.residues.stop - span.residues.start) * span.num_tokens > _MAP_ELEMENTS


def _own_heads(query: Tensor, key: Tensor, weight: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k ``[T, n', d]`` and weights ``[n']`` of the heads whose maps this rank computes.

    Args:
        query: ``[T/c, n/t, d]`` after the rotation, as `key`.
        key: See `query`.
        weight: Of all heads of the layer, ``[n]``.
        config: Configuration of the model.
    """
    heads, size = query.shape[1], config.context_parallel_size
    weight = weight.narrow(0, parallel_state.get_tensor_model_parallel_rank() * heads, heads)
    if size == 1:
        return query, key, weight
    rank = parallel_state.get_context_parallel_rank()
    share = slice(rank * heads // size, (rank + 1) * heads // size)
    # [T/c, 2, n/t, d] -> [T, 2, n/t, d]
    both = gather_for_shares(torch.stack((query, key), dim=1))
    query, key = both[:, :, share].unbind(dim=1)
    return query, key, weight[share]


def _weighted_maps(q: Tensor, k: Tensor, weight: Tensor, residues: slice) -> Tensor:
    """Return the sum over heads of the weighted, corrected attention maps, ``[l, l]``.

    Args:
        q, k: ``[n/t, s, d]``.
        weight: ``[n/t]``.
        residues: Which of the ``s`` tokens are residues.
    """
    q = q[:, residues] * q.shape[-1] ** -0.5
    length = q.shape[1]
    result = q.new_zeros(length, length)
    if not len(q):
        # A context-parallel rank without heads takes part in the backward pass all the same.
        return result + q.sum() * 0.0
    # The number of maps at once depends on the length alone: no other protein changes the order of the sum.
    group = max(1, _MAP_ELEMENTS // (length * k.shape[1]))
    for first in range(0, len(q), group):
        some = slice(first, first + group)
        maps = torch.softmax(q[some] @ k[some].transpose(1, 2), dim=-1)[:, :, residues]
        maps = maps + maps.transpose(1, 2)
        rows = maps.sum(dim=-1)
        average_product = rows.unsqueeze(2) * rows.unsqueeze(1) / rows.sum(dim=-1)[:, None, None]
        result += torch.einsum("n,nij->ij", weight[some], maps - average_product)
    return result
