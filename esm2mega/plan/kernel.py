"""Stands for the attention kernel of another machine: what it allocates and computes, without the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esm2mega.model.packed import PackedSequences


class FusedAttention:
    """Allocates what FlashAttention-2 allocates for a pack, and counts its operations.

    The forward pass keeps q, k, v, the output and the logarithm of each row's sum, in fp32. The backward pass
    adds up the gradient of q in fp32. Both are those of `varlen_attn` and of the flash-attn package.

    Attributes:
        flops: Operations so far: two products forward, five backward.
    """

    def __init__(self) -> None:
        self.flops = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float) -> Tensor:
        """Return an output of the right shape, ``[m, n/t, d]``, with unset values."""
        pairs = sum(m * n for m, n in zip(packed.query_lens, packed.seqlens, strict=True))
        product = 2.0 * pairs * q.shape[1] * q.shape[2]
        self.flops += 2 * product
        return _Allocating.apply(q, k, v, self, product)


class _Allocating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: FusedAttention, product: float) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32))
        ctx.kernel, ctx.product = kernel, product
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, _, rows = ctx.saved_tensors
        ctx.kernel.flops += 5 * ctx.product
        width = -(-q.shape[2] // 32) * 32
        scratch = q.new_empty(*q.shape[:2], width, dtype=torch.float32), torch.empty_like(rows)
        result = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del scratch
        return (*result, None, None)
