"""Stands in for Transformer Engine 2.6: it refuses what that would refuse, and computes by plain PyTorch.

Megatron-Core's wrappers of it are real. Nothing but what they call is here, with the arguments that the
original names; any other is a `TypeError`.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import megatron.core.extensions
import megatron.core.fp8_utils
import megatron.core.utils
import torch
import torch.utils.checkpoint
from megatron.core.transformer import transformer_block
from torch import Tensor
from torch.nn import functional as F

WRAPPERS = "megatron.core.extensions.transformer_engine"
FP8 = "megatron.core.fp8_utils"


class _Linear(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str,
        device: Any,
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__()
        # TE has no kernel for fp64.
        assert params_dtype in (torch.float32, torch.bfloat16, torch.float16), params_dtype
        assert tp_size == 1 and not sequence_parallel and bias
        self.form = {"dtype": params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features, **self.form))
        self.bias = torch.nn.Parameter(torch.zeros(out_features, **self.form))
        self.return_bias = return_bias

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        assert inp.dtype == self.weight.dtype
        weight = self.weight
        if Autocast.active is not None:
            Autocast.firsts.append(is_first_microbatch)
            # What its products in FP8 take.
            multiple = 32 if Autocast.active == "mxfp8" else 16
            assert not inp[..., 0].numel() % multiple and all(n % multiple == 0 for n in weight.shape)
            inp, weight = _in_fp8(inp), _in_fp8(weight)
        if self.return_bias:
            return F.linear(inp, weight), self.bias
        return F.linear(inp, weight, self.bias)


def _in_fp8(values: Tensor) -> Tensor:
    """Round to e4m3 with one scale for the tensor; the gradient passes as it is."""
    scale = 448 / values.detach().float().abs().amax().clamp(min=1e-12)
    rounded = ((values.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(values.dtype)
    return values + (rounded - values).detach()


class Autocast:
    """Lets linears multiply in FP8 in a block.

    Attributes:
        active: The recipe of the block that runs, or None.
        entered: Format and recipe of all blocks.
        firsts: Whether the weights were quantized anew, for each product in FP8.
    """

    active: str | None = None
    entered: list[tuple[str, str]] = []
    firsts: list[bool | None] = []

    def __init__(self, *, enabled: bool, fp8_recipe: Any, fp8_group: Any) -> None:
        assert enabled and fp8_group is not None
        self.recipe = fp8_recipe

    def __enter__(self) -> None:
        assert Autocast.active is None
        Autocast.active = self.recipe["name"]
        Autocast.entered.append((self.recipe["fp8_format"], self.recipe["name"]))

    def __exit__(self, *error: Any) -> None:
        Autocast.active = None


def _tensorwise(*, fp8_format: str, fp8_dpa: bool) -> dict[str, str]:
    assert not fp8_dpa
    return {"name": "tensorwise", "fp8_format": fp8_format}


def _mxfp8(*, fp8_format: str) -> dict[str, str]:
    return {"name": "mxfp8", "fp8_format": fp8_format}


def _checkpoint(
    function: Any, *args: Any, distribute_saved_activations: bool, get_rng_state_tracker: Any, tp_group: Any
) -> Any:
    """Compute again in the backward pass, in the same FP8 as forward."""
    recipe = Autocast.active

    def again(*inner: Any) -> Any:
        with patch.object(Autocast, "active", recipe):
            return function(*inner)

    return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=False)


class Linear(_Linear):
    def __init__(self, *sizes: int, parallel_mode: str, **others: Any) -> None:
        super().__init__(*sizes, parallel_mode=parallel_mode, **others)
        assert parallel_mode == "row"


class LayerNormLinear(_Linear):
    def __init__(
        self,
        *sizes: int,
        eps: float,
        parallel_mode: str,
        normalization: str,
        return_layernorm_output: bool,
        zero_centered_gamma: bool,
        **others: Any,
    ) -> None:
        super().__init__(*sizes, parallel_mode=parallel_mode, **others)
        assert parallel_mode == "column" and normalization == "LayerNorm"
        assert not return_layernorm_output and not zero_centered_gamma
        width = self.weight.shape[1]
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(width, **self.form))
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(width, **self.form))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = F.layer_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(normed, is_first_microbatch)


class DotProductAttention(torch.nn.Module):
    """Attention of packs, ``thd``.

    Attributes:
        calls: The arguments of all calls of all objects, without q, k and v.
    """

    calls: list[dict[str, Any]] = []

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        attn_mask_type: str,
        sequence_parallel: bool,
        tp_size: int,
        get_rng_state_tracker: Any,
        tp_group: Any,
        layer_number: int,
        attention_type: str,
        softmax_scale: float | None,
    ) -> None:
        super().__init__()
        assert (tp_size, attention_type, attention_dropout) == (1, "self", 0.0)
        self.shape = num_attention_heads, kv_channels
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        *,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        cu_seqlens_q_padded: Tensor | None,
        cu_seqlens_kv_padded: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
        **others: Any,
    ) -> Tensor:
        qkv = query_layer, key_layer, value_layer
        # In fp32 it has no kernel for packs.
        assert {x.dtype for x in qkv} <= {torch.bfloat16, torch.float16}
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding", None)
        for x in qkv:
            assert x.shape == (query_layer.shape[0], *self.shape) and x.is_contiguous()
        for borders in (cu_seqlens_q, cu_seqlens_kv):
            assert borders.dtype == torch.int32 and borders.dim() == 1
            assert borders.device == query_layer.device and borders.is_contiguous()
        # Others than `cu_seqlens` would be compared on the host, which waits for the device.
        assert cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None
        assert type(max_seqlen_q) is type(max_seqlen_kv) is int
        self.calls.append({"cu_seqlens": cu_seqlens_q, "max_seqlen": (max_seqlen_q, max_seqlen_kv)})
        if query_layer.is_cuda:  # of fake tensors, whose borders nobody knows
            return (query_layer + key_layer + value_layer).flatten(1)
        assert cu_seqlens_q[-1] == len(query_layer) and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_kv
        parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in qkv), strict=True)
        attended = [F.scaled_dot_product_attention(*(x[None] for x in p), scale=self.scale)[0] for p in parts]
        # Heads and channels come back as one dimension.
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


@contextmanager
def transformer_engine() -> Iterator[list[dict[str, Any]]]:
    """Let Megatron-Core find Transformer Engine in the block; yield the calls of its attention."""

    class Unused:
        """What Megatron-Core derives from and this package never makes."""

    fp8 = _module("fp8", FP8GlobalStateManager=Unused, fp8_autocast=Autocast)
    distributed = _module("distributed", CudaRNGStatesTracker=Unused, checkpoint=_checkpoint)
    tensor = _module("tensor", QuantizedTensor=Unused)
    pytorch = _module(
        "pytorch",
        Linear=Linear,
        LayerNormLinear=LayerNormLinear,
        DotProductAttention=DotProductAttention,
        GroupedLinear=Unused,
        distributed=distributed,
        ops=_module("ops", __getattr__=lambda name: Unused),
        fp8=fp8,
        fp8_autocast=Autocast,
        tensor=tensor,
    )
    recipe = _module(
        "recipe",
        DelayedScaling=Unused,
        Float8CurrentScaling=_tensorwise,
        MXFP8BlockScaling=_mxfp8,
        Format=types.SimpleNamespace(E4M3="e4m3", HYBRID="hybrid"),
    )
    common = _module("common", recipe=recipe)
    te = _module("transformer_engine", pytorch=pytorch, common=common, __version__="2.6.0")
    parts = {"": te, ".pytorch": pytorch, ".pytorch.fp8": fp8, ".pytorch.tensor": tensor}
    parts[".pytorch.distributed"] = distributed
    found = {f"{te.__name__}{name}": part for name, part in parts.items()}
    with (
        patch.dict(sys.modules, found),
        patch.object(megatron.core.utils, "_te_version", None),
        patch.object(megatron.core.extensions, "transformer_engine", None, create=True),
        patch.object(DotProductAttention, "calls", []),
        patch.object(Autocast, "entered", []),
        patch.object(Autocast, "firsts", []),
        patch.object(megatron.core, "fp8_utils", None),
        patch.object(transformer_block, "get_fp8_context", None),
        patch.object(transformer_block, "te_checkpoint", None),
    ):
        for name in (WRAPPERS, FP8):
            sys.modules.pop(name, None)
        wrappers = importlib.import_module(WRAPPERS)
        transformer_block.te_checkpoint = wrappers.te_checkpoint
        transformer_block.get_fp8_context = importlib.import_module(FP8).get_fp8_context
        yield DotProductAttention.calls
