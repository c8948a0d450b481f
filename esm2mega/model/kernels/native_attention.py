"""Gives the compiled attention for CPUs to PyTorch as an operation with a gradient.

The kernel is ``native_attention.cpp``, which `esm2mega.model.kernels.native` compiles.
"""

from __future__ import annotations

from ctypes import c_float, c_int64
from typing import Any

import torch
from torch import Tensor

from esm2mega.model.kernels import native


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernel is made for such queries: it sums 8 channels of a head at a time."""
    return dtype in (torch.float32, torch.bfloat16) and head_dim % 8 == 0


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, scale: float
) -> Tensor:
    """Compute softmax attention within each sequence of a pack, in fp32, on a CPU.

    A protein's output and gradients have the same bits alone, in any pack, and on any number of threads.

    Args:
        q: Queries ``[m, n, d]`` in fp32 or bf16.
        k: Keys ``[T, n, d]``.
        v: Values ``[T, n, d]``.
        cu_seqlens_q: Where the queries of each sequence begin, int32 ``[sequences + 1]``; it may have none.
        cu_seqlens_kv: Where its keys begin, int32 ``[sequences + 1]``.
        scale: Factor of the products of q and k.

    Returns:
        ``[m, n, d]`` in the data type of q.
    """
    out: Tensor = _forward(q, k, v, cu_seqlens_q, cu_seqlens_kv, scale)[0]
    return out


def _outputs(q: Tensor, *unused: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _like_inputs(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *unused: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@native.operation("native_attention", _outputs)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, and the logarithm of each query's sum of exponentials: fp32 ``[n, m]``."""
    out = torch.empty(q.shape, dtype=q.dtype)
    log_sums = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    q, k, v = (_with_dense_channels(x) for x in (q, k, v))
    tensors = (q, k, v, out, log_sums, native.strides((q, k, v, out)), cu_seqlens_q, cu_seqlens_kv)
    native.call("native_attention", "forward", tensors, *_sizes(q, cu_seqlens_q), c_float(scale))
    return out, log_sums


@native.operation("native_attention_backward", _like_inputs)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    grad, q, k, v = (_with_dense_channels(x) for x in (grad, q, k, v))
    strides = native.strides((grad, q, k, v, out, grad_q, grad_k, grad_v))
    tensors = (grad, q, k, v, out, log_sums, grad_q, grad_k, grad_v, strides, cu_seqlens_q, cu_seqlens_kv)
    native.call("native_attention", "backward", tensors, *_sizes(q, cu_seqlens_q), c_float(scale))
    return grad_q, grad_k, grad_v


def _with_dense_channels(x: Tensor) -> Tensor:
    """Return a tensor whose channels lie side by side: a gradient may come expanded, with strides of 0."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, cu_seqlens: Tensor) -> tuple[c_int64, c_int64, c_int64]:
    return c_int64(len(cu_seqlens) - 1), c_int64(q.shape[1]), c_int64(q.shape[2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, unused: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens_q, cu_seqlens_kv, out, log_sums = ctx.saved_tensors
    grads = _backward(grad, q, k, v, out, log_sums, cu_seqlens_q, cu_seqlens_kv, ctx.scale)
    return *grads, None, None, None


def _refuse(ctx: Any, *unused: object) -> tuple[None, ...]:
    raise RuntimeError(
        "the compiled attention has no second derivative; set model.attention_backend=sdpa, which has one"
    )


torch.library.register_autograd("esm2mega::native_attention_backward", _refuse)
torch.library.register_autograd("esm2mega::native_attention", _gradients, setup_context=_keep)
