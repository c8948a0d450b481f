"""Rearranges tensors without arithmetic: fused projections, vocabulary rows, rotary channel order.

Legend: ``h`` hidden size, ``n`` heads, ``d = h / n`` head dimension, ``t`` tensor-parallel size, ``*`` the
columns of a weight, nothing for a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esm2mega.model.esm2 import VOCAB_SIZE
from esm2mega.model.rotary import rotary_frequencies


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Fuse three ``[h, *]`` into head-major ``[3h, *]``: q, k, v of head 0, then of head 1."""
    # [h, *] -> [n, 1, d, *]
    parts = [x.reshape(num_heads, 1, -1, *x.shape[1:]) for x in (q, k, v)]
    # [n, 3, d, *] -> [3h, *]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``[3h, *]`` into q, k and v, three ``[h, *]``, as the inverse of `fuse_qkv`."""
    # [3h, *] -> [n, 3, d, *]
    heads = qkv.reshape(num_heads, 3, -1, *qkv.shape[1:])
    q, k, v = (heads[:, i].reshape(-1, *qkv.shape[1:]) for i in range(3))
    return q, k, v


def interleave_rotary(x: Tensor, num_heads: int) -> Tensor:
    """Reorder rows of q or k from half-split to interleaved rotary pairs, per head.

    Row ``2i`` of the result is row ``i``, and row ``2i + 1`` is row ``i + d/2``: ``[h, *] -> [h, *]``.
    """
    # [h, *] -> [n, 2, d/2, *] -> [n, d/2, 2, *]
    halves = x.reshape(num_heads, 2, -1, *x.shape[1:])
    return halves.transpose(1, 2).reshape(x.shape)


def separate_rotary(x: Tensor, num_heads: int) -> Tensor:
    """Reorder rows of q or k from interleaved to half-split pairs, the inverse of `interleave_rotary`."""
    # [h, *] -> [n, d/2, 2, *] -> [n, 2, d/2, *]
    pairs = x.reshape(num_heads, -1, 2, *x.shape[1:])
    return pairs.transpose(1, 2).reshape(x.shape)


def cut_vocabulary(x: Tensor) -> Tensor:
    """Return only the rows that stand for tokens: ``[V, *] -> [33, *]``."""
    return x[:VOCAB_SIZE]


def pad_vocabulary(x: Tensor, num_rows: int, fill: float = 0.0) -> Tensor:
    """Append rows of the value `fill`: ``[33, *] -> [num_rows, *]``."""
    return torch.cat((x, x.new_full((num_rows - VOCAB_SIZE, *x.shape[1:]), fill)))


def frequencies_note(inv_freq: Tensor, head_dim: int) -> str:
    """Describe rotary frequencies ``[d/2]`` in words: the formula, or how they differ from it."""
    exact = rotary_frequencies(head_dim, torch.float64)
    given = inv_freq.double()
    if torch.equal(inv_freq.float(), rotary_frequencies(head_dim, torch.float32)):
        return "the formula in fp32"
    if torch.equal(given, exact):
        return "the formula in fp64"
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if torch.equal(given, exact.float().to(dtype).double()):
            return f"the formula rounded to {name}"
    return f"not the formula (up to {float(((given - exact) / exact).abs().max()):.1e} from it)"


def same_values(tensors: Sequence[Tensor]) -> bool:
    """Tell whether all tensors have the same values, in whatever dtypes."""
    return all(torch.equal(x.double(), tensors[0].double()) for x in tensors[1:])
