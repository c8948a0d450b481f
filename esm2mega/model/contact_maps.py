"""Computes ESM-2's contacts: a logistic regression on attention maps, which is summed up layer by layer.

Legend: ``n`` heads, ``L`` layers, ``t`` tensor-parallel size, ``d`` head dimension, ``l`` residues of a
sequence, ``s`` its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


class ContactMaps:
    """Sums up the regression's logits over the heads of this rank while a pack passes through the layers.

    The part of each map that belongs to residues is symmetrised and corrected by its average product (APC).
    The regression is a sum over maps, so maps are never kept: only one ``[l, l]`` sum per sequence remains.
    Where gradients are wanted, the maps are computed again in the backward pass, one sequence at a time.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        """Register hooks in `layers`, this rank's transformer layers."""
        self._weights: Mapping[int, Tensor] = {}
        self._spans: Sequence[Span] = ()
        self.sums: list[Tensor] = []
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
                self._add(args[0], args[1], self._weights[layer_number])

        return hook

    def _add(self, query: Tensor, key: Tensor, weight: Tensor) -> None:
        """Add one layer: q and k ``[T, n/t, d]`` after the rotation, and the weight of all heads, ``[n]``."""
        heads = query.shape[1]
        rank = parallel_state.get_tensor_model_parallel_rank()
        # At least fp32 from here on, in any model.
        dtype = torch.promote_types(query.dtype, torch.float32)
        own = weight[rank * heads : (rank + 1) * heads].to(query.device, dtype)
        for number, span in enumerate(self._spans):
            tokens = slice(span.start, span.start + span.num_tokens)
            # [s, n/t, d] -> [n/t, s, d]
            q, k = (x[tokens].transpose(0, 1).to(dtype) for x in (query, key))
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
