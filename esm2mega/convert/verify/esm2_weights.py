"""Arranges the weights of each foreign ESM-2 for the plain model, without the name tables.

A verification uses them as its reference, so that it does not repeat a mistake of the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.convert.files.stores import TensorStore, without_shared_prefix
from esm2mega.convert.formats.cerebras import read_parameters, stored_tensors
from esm2mega.convert.formats.fair_esm import open_file
from esm2mega.convert.formats.hf import open_tensors
from esm2mega.convert.formats.nemo1 import open_archive
from esm2mega.convert.formats.nemo2 import open_directory
from esm2mega.convert.verify.bert_weights import megatron, proteinlm, tape
from esm2mega.convert.verify.plain_model import Affine, PlainBlock, PlainModel, classifier, gelu_classifier
from esm2mega.convert.verify.source import Prepare, WeightSource, by_head, json_config


def read_plain_model(path: Path, format_name: str, prepare: Prepare) -> PlainModel:
    """Read the model in `path` for `esm2mega.convert.verify.plain_model.forward`.

    Args:
        path: A checkpoint that has been read before and is therefore known to be complete.
        format_name: Its format, any but ``esm2mega``.
        prepare: Rounds and casts every weight.
    """
    builders: dict[str, Callable[[Path, Prepare], PlainModel]] = {
        "hf": _hf,
        "fair-esm": _fair_esm,
        "te": _te,
        "cerebras": _cerebras,
        "nemo2": _nemo2,
        "nemo1": _nemo1,
        "tape": tape,
        "proteinlm": proteinlm,
        "megatron": megatron,
    }
    return builders[format_name](path, prepare)


def _formula(head_dim: int) -> Tensor:
    return 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _hf(path: Path, prepare: Prepare) -> PlainModel:
    config, (store, _) = json_config(path), without_shared_prefix(open_tensors(path))
    stem = "esm." if any(name.startswith("esm.") for name in store.infos) else ""
    source = WeightSource(_first_of(store), prepare)

    def block(n: int) -> PlainBlock:
        at = f"{stem}encoder.layer.{n}."
        return PlainBlock(
            attention_norm=source.affine(f"{at}attention.LayerNorm"),
            q=source.affine(f"{at}attention.self.query"),
            k=source.affine(f"{at}attention.self.key"),
            v=source.affine(f"{at}attention.self.value"),
            attention_out=source.affine(f"{at}attention.output.dense"),
            ffn_norm=source.affine(f"{at}LayerNorm"),
            ffn_in=source.affine(f"{at}intermediate.dense"),
            ffn_out=source.affine(f"{at}output.dense"),
        )

    heads = config["num_attention_heads"]
    is_masked_lm = "lm_head.bias" in store.infos
    kinds = {"classifier.weight": "token", "classifier.dense.weight": "sequence"}
    kind = next((kind for name, kind in kinds.items() if name in store.infos), None)
    stored = [name for name in store.infos if name.endswith("inv_freq")]
    return PlainModel(
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        epsilon=config.get("layer_norm_eps", 1e-12),
        block=block,
        table=source.tensor(f"{stem}embeddings.word_embeddings.weight"),
        final_norm=source.affine(f"{stem}encoder.emb_layer_norm_after"),
        head_dense=source.affine("lm_head.dense") if is_masked_lm else None,
        head_norm=source.affine("lm_head.layer_norm") if is_masked_lm else None,
        head_bias=source.tensor("lm_head.bias") if is_masked_lm else None,
        classifier=None if kind is None else classifier(source.tensor, kind),
        inv_freq=store.read(stored[0]).float() if stored else _formula(config["hidden_size"] // heads),
    )


def _first_of(store: TensorStore) -> Callable[[str], Tensor]:
    """Return a function that reads by name, also LayerNorms under the old names of weight and bias."""

    def get(name: str) -> Tensor:
        if name not in store.infos and "LayerNorm." in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        return store.read(name)

    return get


def _fair_esm(path: Path, prepare: Prepare) -> PlainModel:
    found = open_file(path)
    # The file's own prefixes, or none in a state dict that was saved from a model.
    head_stem, stem = "encoder.", "encoder.sentence_encoder."
    if "encoder.lm_head.bias" not in found.store.infos:
        head_stem, stem = "", ""
    source = WeightSource(lambda name: found.store.read(stem + name), prepare)
    head = WeightSource(lambda name: found.store.read(f"{head_stem}lm_head.{name}"), prepare)

    def block(n: int) -> PlainBlock:
        at = f"layers.{n}."
        return PlainBlock(
            attention_norm=source.affine(f"{at}self_attn_layer_norm"),
            q=source.affine(f"{at}self_attn.q_proj"),
            k=source.affine(f"{at}self_attn.k_proj"),
            v=source.affine(f"{at}self_attn.v_proj"),
            attention_out=source.affine(f"{at}self_attn.out_proj"),
            ffn_norm=source.affine(f"{at}final_layer_norm"),
            ffn_in=source.affine(f"{at}fc1"),
            ffn_out=source.affine(f"{at}fc2"),
        )

    stored = [name for name in found.store.infos if name.endswith("rot_emb.inv_freq")]
    width = found.shape.hidden_size // found.shape.num_attention_heads
    return PlainModel(
        num_layers=found.shape.num_layers,
        num_heads=found.shape.num_attention_heads,
        epsilon=1e-5,
        block=block,
        table=source.tensor("embed_tokens.weight"),
        final_norm=source.affine("emb_layer_norm_after"),
        head_dense=head.affine("dense"),
        head_norm=head.affine("layer_norm"),
        head_bias=head.tensor("bias"),
        inv_freq=found.store.read(stored[0]).float() if stored else _formula(width),
    )


def _te(path: Path, prepare: Prepare) -> PlainModel:
    config = json_config(path)
    store, _ = without_shared_prefix(open_tensors(path), ("module.", "_orig_mod."))
    stem = "model." if any(name.startswith("model.") for name in store.infos) else "esm."
    source, heads = WeightSource(store.read, prepare), config["num_attention_heads"]

    def block(n: int) -> PlainBlock:
        at = f"{stem}encoder.layers.{n}."
        fused = source.affine(f"{at}self_attention.layernorm_qkv")
        if str(config.get("qkv_weight_interleaved", True)).lower() in ("true", "1"):
            q, k, v = by_head(fused, heads)
        else:
            weights, biases = fused.weight.chunk(3), fused.bias.chunk(3)
            q, k, v = (Affine(w, b) for w, b in zip(weights, biases, strict=True))
        return PlainBlock(
            attention_norm=source.affine(
                f"{at}self_attention.layernorm_qkv", ".layer_norm_weight", ".layer_norm_bias"
            ),
            q=q,
            k=k,
            v=v,
            attention_out=source.affine(f"{at}self_attention.proj"),
            ffn_norm=source.affine(f"{at}layernorm_mlp", ".layer_norm_weight", ".layer_norm_bias"),
            ffn_in=source.affine(f"{at}layernorm_mlp", ".fc1_weight", ".fc1_bias"),
            ffn_out=source.affine(f"{at}layernorm_mlp", ".fc2_weight", ".fc2_bias"),
        )

    return PlainModel(
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        epsilon=config.get("layer_norm_eps", 1e-12),
        block=block,
        table=source.tensor(f"{stem}embeddings.word_embeddings.weight")[:33],
        final_norm=source.affine(f"{stem}encoder.emb_layer_norm_after"),
        head_dense=source.affine("lm_head.dense"),
        head_norm=source.affine("lm_head.decoder", ".layer_norm_weight", ".layer_norm_bias"),
        head_bias=source.tensor("lm_head.decoder.bias")[:33],
        inv_freq=_formula(config["hidden_size"] // heads),
        tanh_gelu=True,
    )


def _cerebras(path: Path, prepare: Prepare) -> PlainModel:
    state = stored_tensors(path)
    _, config = read_parameters(path)

    def get(name: str) -> Tensor:
        return next(state[stem + name] for stem in ("", "model.", "classifier.") if stem + name in state)

    source = WeightSource(get, prepare)
    pooler = "bert_pooler.pooler.ffn.0.linear_layer"
    has_classifier = any(name.endswith(f"{pooler}.weight") for name in state)
    is_masked_lm = not has_classifier and any("bert_mlm_head." in name for name in state)
    # The classifier's last layer has its own name beside that of the module that it is in.
    last = "classifier.classifier" if "classifier.classifier.weight" in state else "classifier"
    encoder, head = "bert_encoder.transformer_encoder.", "bert_mlm_head."

    def block(n: int) -> PlainBlock:
        at = f"{encoder}layers.{n}."
        return PlainBlock(
            attention_norm=source.affine(f"{at}norm1"),
            q=source.affine(f"{at}self_attn.proj_q_dense_layer"),
            k=source.affine(f"{at}self_attn.proj_k_dense_layer"),
            v=source.affine(f"{at}self_attn.proj_v_dense_layer"),
            attention_out=source.affine(f"{at}self_attn.proj_output_dense_layer"),
            ffn_norm=source.affine(f"{at}norm2"),
            ffn_in=source.affine(f"{at}ffn.ffn.0.linear_layer"),
            ffn_out=source.affine(f"{at}ffn.ffn.1.linear_layer"),
        )

    return PlainModel(
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_heads"],
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        block=block,
        table=source.tensor("bert_encoder.embedding_layer.word_embeddings.weight"),
        final_norm=source.affine(f"{encoder}norm"),
        head_dense=source.affine(f"{head}mlm_transform.ffn.ffn.0.linear_layer") if is_masked_lm else None,
        head_norm=source.affine(f"{head}mlm_transform.ln") if is_masked_lm else None,
        head_bias=source.tensor(f"{head}classifier.ffn.0.linear_layer.bias") if is_masked_lm else None,
        classifier=gelu_classifier(source.affine(pooler), source.affine(last)) if has_classifier else None,
        inv_freq=_formula(config["hidden_size"] // config["num_heads"]),
        interleaved=True,
    )


def _nemo2(path: Path, prepare: Prepare) -> PlainModel:
    description, store = open_directory(path)
    source = WeightSource(store.read, prepare)

    def block(n: int) -> PlainBlock:
        attention, mlp = f"encoder.layers.{n}.self_attention.", f"encoder.layers.{n}.mlp."
        q, k, v = by_head(source.affine(f"{attention}linear_qkv"), description.shape.num_attention_heads)
        return PlainBlock(
            attention_norm=source.affine(f"{attention}linear_qkv", ".layer_norm_weight", ".layer_norm_bias"),
            q=q,
            k=k,
            v=v,
            attention_out=source.affine(f"{attention}linear_proj"),
            ffn_norm=source.affine(f"{mlp}linear_fc1", ".layer_norm_weight", ".layer_norm_bias"),
            ffn_in=source.affine(f"{mlp}linear_fc1"),
            ffn_out=source.affine(f"{mlp}linear_fc2"),
        )

    return PlainModel(
        num_layers=description.shape.num_layers,
        num_heads=description.shape.num_attention_heads,
        epsilon=description.layernorm_epsilon,
        block=block,
        table=source.tensor("embedding.word_embeddings.weight")[:33],
        final_norm=source.affine("encoder.final_layernorm"),
        head_dense=source.affine("lm_head.dense"),
        head_norm=source.affine("lm_head.layer_norm"),
        head_bias=source.tensor("output_layer.bias")[:33],
        inv_freq=_formula(description.head_dim),
        tanh_gelu=description.activation == "gelu_tanh",
    )


def _nemo1(path: Path, prepare: Prepare) -> PlainModel:
    description, store = open_archive(path)
    source, frequencies = WeightSource(store.read, prepare), "language_model.rotary_pos_emb.inv_freq"

    def block(n: int) -> PlainBlock:
        at = f"language_model.encoder.layers.{n}."
        fused = source.affine(f"{at}self_attention.query_key_value")
        q, k, v = by_head(fused, description.shape.num_attention_heads)
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

    stored = frequencies in store.infos
    return PlainModel(
        num_layers=description.shape.num_layers,
        num_heads=description.shape.num_attention_heads,
        epsilon=description.layernorm_epsilon,
        block=block,
        table=source.tensor("language_model.embedding.word_embeddings.weight")[:33],
        final_norm=source.affine("language_model.encoder.final_layernorm"),
        head_dense=source.affine("lm_head.dense"),
        head_norm=source.affine("lm_head.layernorm"),
        head_bias=source.tensor("lm_head.bias")[:33],
        inv_freq=store.read(frequencies).float() if stored else _formula(description.head_dim),
        tanh_gelu=description.activation == "gelu_tanh",
    )
