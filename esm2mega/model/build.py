"""Builds this rank's part of the model; only this file translates our keys to Megatron-Core's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import gelu

from esm2mega.config.model import context_exchange
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.model import layer_spec
from esm2mega.model.attention import choose_kernel
from esm2mega.model.compiled import can_compile
from esm2mega.model.esm2 import ESM2Model, padded_vocab_size, stage_flags
from esm2mega.model.heads.task import ESM2ForTask, MakeHead, MakeModel
from esm2mega.model.init import initialize_parameters
from esm2mega.model.kernels.fp8 import check_fp8
from esm2mega.model.pipeline_split import last_layer_is_whole, pipeline_layout, split_layers

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass
class ESM2TransformerConfig(TransformerConfig):
    """Extends Megatron-Core's configuration by kernels as they were chosen and by fields of `ModelConfig`.

    Megatron-Core's own `hidden_dropout` and `attention_dropout` stay 0, since they draw from generators.
    """

    packed_attention: str = "sdpa"
    layer_spec: str = "local"
    family: str = "esm2"
    final_layernorm: bool = True
    max_positions: int = 0
    keyed_hidden_dropout: float = 0.0
    keyed_attention_dropout: float = 0.0
    keyed_adapter_dropout: float = 0.0
    compiled_layers: bool = False
    last_layer_whole: bool = False
    context_exchange: str = "needed"

    @property
    def drops(self) -> bool:
        """Return whether training needs `PackedSequences.with_dropout_keys`."""
        dropouts = self.keyed_hidden_dropout, self.keyed_attention_dropout, self.keyed_adapter_dropout
        return max(dropouts) > 0


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    device: torch.device,
    packed_attention: str,
    layer_spec: str = "local",
) -> ESM2TransformerConfig:
    """Translate our configuration to Megatron-Core's.

    Args:
        model: Shape and numerics.
        parallel: Layout.
        device: Where the weights live.
        packed_attention: Kernel name from `choose_kernel`, or ``te`` for that of Transformer Engine.
        layer_spec: ``local`` or ``te``, from `choose_layer_spec`.
    """
    dtype = DTYPES[model.precision]
    shape = shape_of(model)
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    stages = parallel.pipeline_model_parallel_size
    vocabulary = padded_vocab_size(parallel.tensor_model_parallel_size)
    whole = last_layer_is_whole(model, parallel)
    counts = split_layers(shape, stages, vocabulary, last_layer_whole=whole)
    return ESM2TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=ACTIVATIONS[model.activation],
        # The fused kernel is always the tanh approximation; ESM-2 has the exact-erf form.
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.precision == "bf16",
        fp16=model.precision == "fp16",
        use_cpu_initialization=device.type == "cpu",
        # `esm2mega.model.init` fills the weights, the same at every layout. Megatron-Core's own initialiser
        # still has to run, since it marks which dimension of a weight is split, but it draws nothing.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        # The chunks of an interleaved pipeline are all equal, which is Megatron-Core's own split.
        pipeline_model_parallel_layout=None if interleaved or stages == 1 else pipeline_layout(counts),
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        # Loss functions return sums and counts; gradients are divided once, by the global count.
        calculate_per_token_loss=True,
        # With two pipeline ranks the previous and the next rank are the same peer, and the batched exchange
        # of the interleaved schedule swaps their messages silently. The overlapped one keeps them apart.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        packed_attention=packed_attention,
        layer_spec=layer_spec,
        family=model.family,
        final_layernorm=model.final_layernorm,
        max_positions=model.max_positions or 0,
        keyed_hidden_dropout=model.hidden_dropout,
        keyed_attention_dropout=model.attention_dropout,
        compiled_layers=model.compile and can_compile(device),
        last_layer_whole=whole,
        context_exchange=context_exchange(model, parallel),
        **_recompute(model.recompute),
        **_fp8(model),
    )


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _recompute(mode: str) -> dict[str, Any]:
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if mode == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _fp8(model: ModelConfig) -> dict[str, Any]:
    # Weights stay in bf16, and neither recipe has a state that a checkpoint would have to keep.
    return {} if model.fp8 is None else {"fp8": model.fp8, "fp8_recipe": Fp8Recipe(model.fp8_recipe)}


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    device: torch.device,
    seed: int,
    make_head: MakeHead | None = None,
    has_lora: bool = False,
    make_model: MakeModel | None = None,
) -> list[ESM2Model]:
    """Build this rank's chunks of the model with initial weights: one, or several if interleaved.

    Args:
        model: Shape and numerics.
        parallel: Layout.
        device: Where the weights live.
        seed: Seed of the initial weights.
        make_head: Makes the head of a task; None for the masked-language-model head.
        has_lora: Whether its linears will get adapters, which need the input that fused layers keep inside.
        make_model: Makes a chunk with the head of a task; None for `ESM2ForTask`.
    """
    # Post-LN needs LayerNorms of their own, not fused into the linears that follow; compiled layers are ours.
    is_local = has_lora or model.compile or model.family == "proteinbert_postln"
    spec_name = "local" if is_local else model.layer_spec
    spec = layer_spec.choose_layer_spec(spec_name, device, DTYPES[model.precision])
    # Transformer Engine's attention has no kernel for packs in fp32, draws its dropout from a generator, and
    # its own context parallelism cuts each protein, not the pack.
    te_attention = (
        spec == "te"
        and model.attention_backend in ("auto", "te")
        and DTYPES[model.precision] in (torch.bfloat16, torch.float16)
        and not model.attention_dropout
        and parallel.context_parallel_size == 1
    )
    check_fp8(model, spec, device)
    shape = shape_of(model)
    head_dim = shape.hidden_size // shape.num_attention_heads
    kernel = (
        "te"
        if te_attention
        else choose_kernel(model.attention_backend, device, DTYPES[model.precision], head_dim)
    )
    config = transformer_config(model, parallel, device, kernel, spec)
    layer = (
        layer_spec.te_layer(kernel, model.fp8_recipe if model.fp8 else None)
        if spec == "te"
        else layer_spec.local_layer(post_layernorm=model.family == "proteinbert_postln")
    )

    virtual = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in [None] if virtual is None else range(virtual):
        pre_process, post_process = stage_flags(vp_stage)
        num_layers = get_num_layers_to_build(config, vp_stage)
        stage = (config, layer_spec.block(layer, num_layers), device, pre_process, post_process, vp_stage)
        if make_head is None:
            made = ESM2Model(*stage)
        else:
            made = (make_model or ESM2ForTask)(*stage, make_head=make_head)
        chunk = made.to(device)
        initialize_parameters(chunk, seed, model.init_std)
        chunks.append(chunk)
    return chunks
