"""Compiles what a layer computes before and after its attention (`model.compile`).

The attention stays outside, and with it the borders of a pack: no graph depends on them, so a pack of other
proteins, or of another length, needs no new one.

Legend: ``T`` tokens of a pack, ``m`` of them whose output is wanted, ``h`` hidden size, ``n`` heads,
``d`` head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from esm2mega.model.linear import ColumnLinear, RowLinear

BACKEND = "inductor"
"""Compiles the graphs: PyTorch's own, by a C++ compiler or Triton."""


def before_attention(layer: Any, hidden_states: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute LayerNorm, projection and rotation: ``[T, 1, h]`` -> q, k and v, each ``[T, n, d]``.

    Args:
        layer: The layer.
        hidden_states: Its input.
        tables: ``[2, T, 1, d / 2]`` from `esm2mega.model.rotary.RotaryTables`.
    """
    norm, projection = layer.input_layernorm, layer.self_attention.linear_qkv
    # Without the middle dimension, of which the embedding's output has another stride than that of a layer.
    hidden_states = hidden_states.squeeze(1)
    torch._dynamo.maybe_mark_dynamic(hidden_states, 0)
    torch._dynamo.maybe_mark_dynamic(tables, 1)
    heads = layer.self_attention.num_attention_heads_per_partition
    compiled, _ = _functions()
    return compiled(hidden_states, *_weights(norm, projection), tables, heads, norm.eps)


def after_attention(layer: Any, residual: Tensor, context: Tensor) -> Tensor:
    """Compute the output of a layer, ``[m, 1, h]``.

    Args:
        layer: The layer.
        residual: Its input, ``[m, 1, h]``.
        context: What its attention has computed, ``[m, 1, h]``.
    """
    norm, mlp = layer.pre_mlp_layernorm, layer.mlp
    residual, context = residual.squeeze(1), context.squeeze(1)
    torch._dynamo.maybe_mark_dynamic(residual, 0)
    torch._dynamo.maybe_mark_dynamic(context, 0)
    weights = _weights(layer.self_attention.linear_proj, norm, mlp.linear_fc1, mlp.linear_fc2)
    approximate = "tanh" if isinstance(layer.config.activation_func, partial) else "none"
    _, compiled = _functions()
    return compiled(residual, context, *weights, norm.eps, approximate).unsqueeze(1)


def is_plain(layer: Any) -> bool:
    """Tell whether a layer computes what its weights say: no part is replaced or has adapters beside it."""
    attention, mlp = layer.self_attention, layer.mlp
    parts = attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2
    return all(type(part) in (ColumnLinear, RowLinear) and not part._forward_hooks for part in parts)


@cache
def can_compile(device: torch.device) -> bool:
    """Return whether this machine compiles for a device; if not, a line says why."""
    # In this process: there are two graphs, and other processes would outlive a killed parent.
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    try:
        torch.compile(lambda x: x + 1.0, backend=BACKEND)(torch.zeros(64, device=device))
    except Exception as error:  # whatever compilers raise, or PyTorch where it finds none
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        print(
            f"esm2mega: model.compile has no compiler here, so layers run as they are ({why})",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def _weights(*modules: Any) -> list[Tensor]:
    return [weight for module in modules for weight in (module.weight, module.bias)]


@cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return torch.compile(_before, backend=BACKEND), torch.compile(_after, backend=BACKEND)


def _before(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
    tables: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed = layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    # Rows of the fused weight are head-major, q k v per head.
    q, k, v = linear(normed, weight, bias).view(x.shape[0], heads, 3, -1).unbind(dim=2)
    return _rotated(q, tables), _rotated(k, tables), v.contiguous()


def _rotated(x: Tensor, tables: Tensor) -> Tensor:
    """Rotate ``x [T, n, d]`` in the dtype of the tables, and round once."""
    cos, sin = tables
    first, second = x.to(tables.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _after(
    residual: Tensor, context: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
    down_weight: Tensor, down_bias: Tensor, eps: float, approximate: str,
) -> Tensor:  # fmt: skip
    hidden_states = residual + linear(context, proj_weight, proj_bias)
    normed = layer_norm(hidden_states, norm_weight.shape, norm_weight, norm_bias, eps)
    inner = gelu(linear(normed, up_weight, up_bias), approximate=approximate)
    return hidden_states + linear(inner, down_weight, down_bias)
