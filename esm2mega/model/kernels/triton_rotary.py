"""Turns q and k in one pass with a kernel of Triton, which reads and writes every number once.

Legend: ``T`` tokens of a pack, ``n`` heads, ``t`` tensor-parallel size, ``d`` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024
"""Pairs of channels that one program turns, at most."""


@triton.jit
def _turn_pairs(source, target, at, to, cos, sin, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.load(source + at, mask=inside, other=0.0).to(cos.dtype)
    second = tl.load(source + at + HALF, mask=inside, other=0.0).to(cos.dtype)
    kind = target.dtype.element_ty
    tl.store(target + to, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(target + to + HALF, (second * cos + first * sin).to(kind), mask=inside)


@triton.jit
def _turn_token(  # type: ignore[no-untyped-def]
    q, k, v, to_q, to_k, to_v, cos_table, sin_table,
    q_token, q_head, k_token, k_head, v_token, v_head, to_token, to_head, heads,
    HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    # 64 bits, since an offset is up to 3 T n d.
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (pair < HALF)
    cos = tl.load(cos_table + token * HALF + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_table + token * HALF + pair, mask=pair < HALF, other=0.0)
    if BACK:
        sin = -sin
    to = token * to_token + head * to_head + pair
    _turn_pairs(q, to_q, token * q_token + head * q_head + pair, to, cos, sin, inside, HALF)
    _turn_pairs(k, to_k, token * k_token + head * k_head + pair, to, cos, sin, inside, HALF)
    at = token * v_token + head * v_head + pair
    tl.store(to_v + to, tl.load(v + at, mask=inside), mask=inside)
    tl.store(to_v + to + HALF, tl.load(v + at + HALF, mask=inside), mask=inside)


def turn(sources: Sequence[Tensor], targets: Sequence[Tensor], tables: Tensor, back: bool = False) -> None:
    """Write q and k, turned in the dtype of the tables and rounded once, and v as it is.

    Args:
        sources: q, k and v, each ``[T, n/t, d]`` with any strides.
        targets: As `sources`; all three have the same strides, and no gap between channels.
        tables: ``[2, T, 1, d / 2]``, cos then sin.
        back: Turn by the negative angles.
    """
    tokens, heads, channels = sources[0].shape
    half = channels // 2
    pairs = triton.next_power_of_2(half)
    block = min(triton.next_power_of_2(heads), max(1, _TILE // pairs))
    sources = [x if x.stride(2) == 1 else x.contiguous() for x in sources]
    strides = [x.stride(dimension) for x in sources for dimension in (0, 1)]
    kernel: Any = _turn_token[(tokens, triton.cdiv(heads, block))]
    kernel(
        *sources, *targets, tables[0], tables[1], *strides, *targets[0].stride()[:2], heads,
        HALF=half, HEADS=block, PAIRS=pairs, BACK=back,
        # Products are rounded before they are added, as PyTorch's are.
        enable_fp_fusion=False,
    )  # fmt: skip
