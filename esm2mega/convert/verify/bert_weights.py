"""Arranges the weights of TAPE and ProteinLM for the plain model, without the name tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.convert.formats.megatron import open_checkpoint
from esm2mega.convert.formats.tape import stored_tensors
from esm2mega.convert.verify.bert_heads import head_of
from esm2mega.convert.verify.plain_model import PlainBlock, PlainModel
from esm2mega.convert.verify.source import Prepare, WeightSource, by_head, json_config

# Ids of ESM-2 for TAPE's <pad> <mask> <cls> <sep> <unk> A B C D E F G H I K L M N O P Q R S T U V W X Y Z.
_TAPE = [
    1,
    32,
    0,
    2,
    3,
    5,
    25,
    23,
    13,
    9,
    18,
    6,
    21,
    12,
    15,
    4,
    20,
    17,
    28,
    14,
    16,
    10,
    8,
    11,
    26,
    7,
    22,
    24,
    19,
    27,
]


def tape(path: Path, prepare: Prepare) -> PlainModel:
    """Arrange the weights of stock TAPE, post-LN."""
    config, state = json_config(path), stored_tensors(path)[0]
    source = WeightSource(lambda name: state[f"bert.{name}"], prepare)

    def block(n: int) -> PlainBlock:
        at = f"encoder.layer.{n}."
        before = "embeddings.LayerNorm" if n == 0 else f"encoder.layer.{n - 1}.output.LayerNorm"
        return PlainBlock(
            attention_norm=source.affine(before),
            q=source.affine(f"{at}attention.self.query"),
            k=source.affine(f"{at}attention.self.key"),
            v=source.affine(f"{at}attention.self.value"),
            attention_out=source.affine(f"{at}attention.output.dense"),
            ffn_norm=source.affine(f"{at}attention.output.LayerNorm"),
            ffn_in=source.affine(f"{at}intermediate.dense"),
            ffn_out=source.affine(f"{at}output.dense"),
        )

    last = f"encoder.layer.{config['num_hidden_layers'] - 1}.output.LayerNorm"
    model = _tape_model(config, state, source, prepare, block)
    return replace(model, final_norm=source.affine(last), post_norm=True)


def _tape_model(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    source: WeightSource,
    prepare: Prepare,
    block: Callable[[int], PlainBlock],
) -> PlainModel:
    """Arrange what stock and modified TAPE have in common."""
    head = WeightSource(lambda name: state[f"mlm.{name}"], prepare)
    is_masked_lm = "mlm.bias" in state
    positions = source.tensor("embeddings.position_embeddings.weight")
    return PlainModel(
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        epsilon=config.get("layer_norm_eps", 1e-12),
        block=block,
        table=source.tensor("embeddings.word_embeddings.weight"),
        final_norm=None,
        head_dense=head.affine("transform.dense") if is_masked_lm else None,
        head_norm=head.affine("transform.LayerNorm") if is_masked_lm else None,
        head_bias=head.tensor("bias") if is_masked_lm else None,
        classifier=None if is_masked_lm else head_of(state, prepare),
        positions=positions + source.tensor("embeddings.token_type_embeddings.weight")[0],
        tokens=torch.tensor(_TAPE),
    )


def proteinlm(path: Path, prepare: Prepare) -> PlainModel:
    """Arrange the weights of ProteinLM's modified TAPE, pre-LN."""
    config, state = json_config(path), stored_tensors(path)[0]
    source = WeightSource(lambda name: state[f"bert.{name}"], prepare)

    def block(n: int) -> PlainBlock:
        at = f"encoder.layer.{n}."
        return PlainBlock(
            attention_norm=source.affine(f"{at}input_ln"),
            q=source.affine(f"{at}attention.self.query"),
            k=source.affine(f"{at}attention.self.key"),
            v=source.affine(f"{at}attention.self.value"),
            attention_out=source.affine(f"{at}attention.dense"),
            ffn_norm=source.affine(f"{at}post_attn_ln"),
            ffn_in=source.affine(f"{at}mlp.dense_h_4h"),
            ffn_out=source.affine(f"{at}mlp.dense_4h_h"),
        )

    # final_ln is left out: the model there computes it and discards the result.
    return _tape_model(config, state, source, prepare, block)


def megatron(path: Path, prepare: Prepare) -> PlainModel:
    """Arrange the weights of ProteinLM as Megatron-LM wrote them."""
    description, store = open_checkpoint(path)
    source, heads = WeightSource(store.read, prepare), description.shape.num_attention_heads
    embedding = "language_model.embedding."

    def block(n: int) -> PlainBlock:
        at = f"language_model.encoder.layers.{n}."
        q, k, v = by_head(source.affine(f"{at}self_attention.query_key_value"), heads)
        return PlainBlock(
            attention_norm=source.affine(f"{at}input_layernorm"),
            q=q,
            k=k,
            v=v,
            attention_out=source.affine(f"{at}self_attention.dense"),
            ffn_norm=source.affine(f"{at}post_attention_layernorm"),
            ffn_in=source.affine(f"{at}mlp.dense_h_to_4h"),
            ffn_out=source.affine(f"{at}mlp.dense_4h_to_h"),
        )

    # Row 5 is unused, and the rows from 31 on are padding.
    rows = torch.tensor([row for row in range(31) if row != 5])
    return PlainModel(
        num_layers=description.shape.num_layers,
        num_heads=heads,
        epsilon=description.layernorm_epsilon,
        block=block,
        table=source.tensor(f"{embedding}word_embeddings.weight")[rows],
        final_norm=source.affine("language_model.encoder.final_layernorm"),
        head_dense=source.affine("lm_head.dense"),
        head_norm=source.affine("lm_head.layernorm"),
        head_bias=source.tensor("lm_head.bias")[rows],
        tanh_gelu=description.activation == "gelu_tanh",
        positions=source.tensor(f"{embedding}position_embeddings.weight"),
        tokens=torch.tensor(_TAPE),
    )
