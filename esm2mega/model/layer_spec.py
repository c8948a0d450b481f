"""Chooses the modules of a transformer layer: Megatron-Core's own linears, or Transformer Engine's.

Both specs write the same checkpoint keys: the LayerNorms of the local spec are stored under the names that
they have inside Transformer Engine's fused LayerNorm-linear modules.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from esm2mega.errors import UserError
from esm2mega.model.attention import ESM2SelfAttention, PackedCoreAttention
from esm2mega.model.kernels.fp8 import whole_blocks
from esm2mega.model.layer import ESM2Layer
from esm2mega.model.layernorm import LayerNorm
from esm2mega.model.linear import ColumnLinear, RowLinear
from esm2mega.model.proteinbert import PostLayerNormLayer


def transformer_engine_found() -> bool:
    """Return whether Transformer Engine can be imported here (it cannot without CUDA libraries)."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def choose_layer_spec(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `model.layer_spec` to ``local`` or ``te``; ``auto`` is Transformer Engine where it can run.

    Args:
        name: ``auto``, ``local`` or ``te``.
        device: Where the model lives; Transformer Engine needs CUDA.
        dtype: Data type of the weights; Transformer Engine has no fp64.
    """
    found = device.type == "cuda" and dtype != torch.float64 and transformer_engine_found()
    if name == "te" and not found:
        raise UserError(
            "model.layer_spec=te needs CUDA, Transformer Engine (pip install 'esm2mega[te]') and no fp64; "
            "set model.layer_spec=auto"
        )
    return ("te" if found else "local") if name == "auto" else name


def local_layer(post_layernorm: bool = False) -> ModuleSpec:
    """Return the spec of a layer that runs everywhere: Megatron-Core's parallel linears and our LayerNorm.

    Args:
        post_layernorm: Whether residuals are taken from the outputs of the LayerNorms.
    """
    return _layer(
        module=PostLayerNormLayer if post_layernorm else ESM2Layer,
        norm=LayerNorm,
        column=ColumnLinear,
        row=RowLinear,
        core_attention=PackedCoreAttention,
        keys={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )


def te_layer(core_attention: str, fp8_recipe: str | None = None) -> ModuleSpec:
    """Return the spec of a layer of Transformer Engine's fused LayerNorm-linear modules.

    GELU stays PyTorch's exact-erf one: Transformer Engine's kernel is the tanh approximation.

    Args:
        core_attention: ``te`` for Transformer Engine's attention, else one of
            `esm2mega.model.attention.KERNELS`.
        fp8_recipe: The value of `model.fp8_recipe` if linears multiply in FP8.
    """
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    column, row = TELayerNormColumnParallelLinear, TERowParallelLinear
    if fp8_recipe is not None:
        column, row = whole_blocks(column, fp8_recipe), whole_blocks(row, fp8_recipe)
    return _layer(
        module=ESM2Layer,
        norm=None,
        column=column,
        row=row,
        core_attention=TEDotProductAttention if core_attention == "te" else PackedCoreAttention,
        keys={},
    )


def _layer(
    module: Any, norm: Any, column: Any, row: Any, core_attention: Any, keys: dict[str, str]
) -> ModuleSpec:
    norms = {} if norm is None else {"input_layernorm": norm, "pre_mlp_layernorm": norm}
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=ESM2SelfAttention,
                # padding, not causal: the polarity that Transformer Engine needs for bidirectional packs
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=core_attention, linear_proj=row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
            **norms,
        ),
    )


def block(layer: ModuleSpec, num_layers: int) -> TransformerBlockSubmodules:
    """Return the spec of a stage: `num_layers` equal layers, and the final LayerNorm for the last stage."""
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LayerNorm)
