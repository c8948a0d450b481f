"""Turns q and k on a CPU in one pass that reads and writes every number once.

The kernel is ``native_rotary.cpp``, which `esm2mega.model.kernels.native` compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64

import torch
from torch import Tensor

from esm2mega.model.kernels import native


def turn(sources: Sequence[Tensor], targets: Sequence[Tensor], tables: Tensor, back: bool = False) -> None:
    """Write what `esm2mega.model.rotary.turn` writes, bit for bit, in fp32, fp64 or bf16.

    Args:
        sources: q, k and v, each ``[T, n/t, d]``.
        targets: As `sources`, with no gap between channels.
        tables: ``[2, T, 1, d / 2]``, cos then sin.
        back: Turn by the negative angles.
    """
    _turn(*sources, *targets, tables, back)


@native.operation("native_turn", lambda *unused: None, mutates=("to_q", "to_k", "to_v"))
def _turn(
    q: Tensor, k: Tensor, v: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, tables: Tensor, back: bool
) -> None:
    sources = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    targets = (to_q, to_k, to_v)
    strides = native.strides((*sources, *targets))
    sizes = (c_int64(q.shape[0]), c_int64(q.shape[1]), c_int64(q.shape[2] // 2))
    # A model that was cast keeps the precision of its tables.
    tables = tables.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    tensors = (*sources, *targets, tables[0], tables[1], strides)
    native.call("native_rotary", "turn", tensors, *sizes, c_int(back))
