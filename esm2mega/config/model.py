"""Checks the rules between the keys of the section `model`, and what else its layers have to fit to.

It is pure Python, like `esm2mega.config.validate`.
"""

from __future__ import annotations

from esm2mega.config.batches import shares_of_a_pack
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import LoRAConfig, ModelConfig, ParallelConfig
from esm2mega.errors import UserError

_ALIGNED = 8
"""Is what packs with room left are a multiple of on each process: products of matrices are fast there."""

FP8_MULTIPLES = {"tensorwise": 16, "mxfp8": 32}
"""Says what rows and columns of a product in FP8 are a multiple of, by recipe."""


def check_model(model: ModelConfig, max_seq_length: int) -> None:
    """Check the model on its own, and its positions against the longest protein, in tokens."""
    _check_family(model, max_seq_length)
    _check_numerics(model)


def check_context(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that attention can be exchanged between the context-parallel processes as is asked for."""
    size, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if size == 1:
        if parallel.context_parallel_exchange != "auto":
            raise UserError(
                f"parallel.context_parallel_exchange={parallel.context_parallel_exchange} needs "
                "parallel.context_parallel_size > 1; set parallel.context_parallel_exchange=auto"
            )
        return
    heads = shape_of(model).num_attention_heads // tp
    if parallel.context_parallel_exchange == "heads" and heads % size:
        raise UserError(
            f"parallel.context_parallel_exchange=heads gives each of parallel.context_parallel_size={size} "
            f"processes an equal number of heads, and there are {heads} (model.num_attention_heads / "
            "parallel.tensor_model_parallel_size); set parallel.context_parallel_exchange=auto"
        )
    if model.attention_backend == "te":
        raise UserError(
            "model.attention_backend=te attends within one process, and "
            f"parallel.context_parallel_size={size} divides the tokens; set model.attention_backend=auto"
        )


def context_exchange(model: ModelConfig, parallel: ParallelConfig) -> str:
    """Return what `parallel.context_parallel_exchange` means: ``heads``, ``needed`` or ``gather``.

    By heads, every process has the same work whatever the lengths of the proteins, and sends least.
    """
    if parallel.context_parallel_exchange != "auto":
        return parallel.context_parallel_exchange
    heads = shape_of(model).num_attention_heads // parallel.tensor_model_parallel_size
    return "needed" if heads % parallel.context_parallel_size else "heads"


def check_layers(model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig, tokens: int) -> None:
    """Check that the layers are of the kinds that are compiled, or multiply in FP8, if they shall be.

    Args:
        model: Shape and numerics.
        parallel: Layout.
        lora: Adapters.
        tokens: Tokens of a micro-batch.
    """
    _check_compile(model, parallel, lora)
    if model.fp8 is not None:
        _check_fp8(model, parallel, lora, tokens)


def _check_fp8(model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig, tokens: int) -> None:
    for key, value, needed in (
        ("model.precision", model.precision, ("bf16",)),
        ("model.layer_spec", model.layer_spec, ("auto", "te")),
        ("model.family", model.family, ("esm2", "proteinbert_preln")),
        ("model.compile", model.compile, (False,)),
        ("lora.rank", lora.rank, (None,)),
    ):
        if value not in needed:
            raise UserError(
                f"model.fp8={model.fp8} needs layers of Transformer Engine in bf16, and there are none with "
                f"{key}={value}; set model.fp8=null"
            )
    shape, multiple = shape_of(model), FP8_MULTIPLES[model.fp8_recipe]
    tp = parallel.tensor_model_parallel_size
    shared = [
        ("model.hidden_size", shape.hidden_size, tp),
        ("model.ffn_hidden_size", shape.ffn_hidden_size, tp),
    ]
    if (shares := shares_of_a_pack(parallel)) > 1:
        shared.append(("train.micro_batch_tokens", tokens, shares))
    for key, count, parts in shared:
        if count % (multiple * parts):
            raise UserError(
                f"model.fp8_recipe={model.fp8_recipe} needs a multiple of {multiple} on each of the {parts} "
                f"processes that share it, and {key}={count} is no multiple of {multiple * parts}; set "
                "model.fp8=null"
            )


def tail_multiple(model: ModelConfig, parallel: ParallelConfig) -> int | None:
    """Return of how many tokens packs with room left are a multiple.

    None means that every pack must have T tokens: the stages of a pipeline send packs of one length.
    """
    if parallel.pipeline_model_parallel_size > 1:
        return None
    return shares_of_a_pack(parallel) * (FP8_MULTIPLES[model.fp8_recipe] if model.fp8 else _ALIGNED)


def _check_compile(model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig) -> None:
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
