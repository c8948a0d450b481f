"""Checks the rules between the keys of the section `model`, and what else its layers have to fit to.

It is pure Python, like `esm2mega.config.validate`.
"""

from __future__ import annotations

from esm2mega.config.presets import shape_of
from esm2mega.config.schema import LoRAConfig, ModelConfig, ParallelConfig
from esm2mega.errors import UserError


def check_model(model: ModelConfig, max_seq_length: int) -> None:
    """Check the model on its own, and its positions against the longest protein, in tokens."""
    _check_family(model, max_seq_length)
    _check_numerics(model)


def check_compile(model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig) -> None:
    """Check that the layers are of the only kind that is compiled."""
    if not model.compile:
        return
    tp = "parallel.tensor_model_parallel_size"
    for key, value, needed in (
        (tp, parallel.tensor_model_parallel_size, 1),
        ("model.family", model.family, "esm2"),
        ("model.layer_spec", model.layer_spec, ("auto", "local")),
        ("model.attention_backend", model.attention_backend, ("auto", "sdpa", "native", "varlen", "flash")),
        ("model.hidden_dropout", model.hidden_dropout, 0),
        ("lora.rank", lora.rank, None),
    ):
        if value not in (needed if isinstance(needed, tuple) else (needed,)):
            raise UserError(
                f"model.compile=true compiles no layers with {key}={value}; set model.compile=false"
            )


def _check_family(model: ModelConfig, max_seq_length: int) -> None:
    """Check positions, LayerNorms and layers against the family of the model."""
    if model.family == "esm2" and model.max_positions is not None:
        raise UserError(
            f"model.max_positions={model.max_positions} does not go with model.family=esm2, which has rotary "
            "positions; set model.max_positions=null"
        )
    if model.family != "esm2" and (model.max_positions or 0) < max_seq_length:
        raise UserError(
            f"model.max_positions={model.max_positions} is less than "
            f"data.max_seq_length={max_seq_length}; model.family={model.family} has a learned "
            "position for each token: raise the one or lower the other"
        )
    if not model.final_layernorm and model.family != "proteinbert_preln":
        raise UserError(
            f"model.final_layernorm=false does not go with model.family={model.family}; set it to true"
        )
    if model.family == "proteinbert_postln" and model.layer_spec == "te":
        raise UserError(
            "model.layer_spec=te does not go with model.family=proteinbert_postln, whose LayerNorms are not "
            "fused; set model.layer_spec=auto"
        )


def _check_numerics(model: ModelConfig) -> None:
    """Check the shape, and what precision and dropout allow."""
    shape = shape_of(model)
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if hidden % heads:
        raise UserError(
            f"model.hidden_size={hidden} is not divisible by model.num_attention_heads={heads}; "
            "change one of the two"
        )
    if hidden // heads % 2:
        raise UserError(
            f"model.hidden_size={hidden} / model.num_attention_heads={heads} gives head dimension "
            f"{hidden // heads}, which is odd; rotary positions rotate pairs of channels: choose an even one"
        )
    if model.attention_dropout and model.attention_backend not in ("auto", "sdpa"):
        raise UserError(
            f"model.attention_dropout={model.attention_dropout} needs masks that are equal at every layout, "
            f"and model.attention_backend={model.attention_backend} takes none; set "
            "model.attention_backend=sdpa or model.attention_dropout=0"
        )
    if model.attention_backend in ("varlen", "flash") and model.precision not in ("bf16", "fp16"):
        raise UserError(
            f"model.attention_backend={model.attention_backend} computes in half precision only, but "
            f"model.precision={model.precision}; set model.precision=bf16 or fp16, or "
            "model.attention_backend=auto"
        )
    if model.precision == "fp64" and "te" in (model.layer_spec, model.attention_backend):
        raise UserError(
            "model.precision=fp64 does not exist in Transformer Engine; "
            "set model.layer_spec=local and model.attention_backend=sdpa"
        )
