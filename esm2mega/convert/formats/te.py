"""Reads and writes directories of NVIDIA's Transformer Engine ESM-2, such as ``nvidia/esm2_*``.

Names are those of BioNeMo framework, ``recipes/models/esm2``. The model there has the tanh form of GELU in
its feed-forward layers (Transformer Engine's kernel) and computes its rotary frequencies; it has no contact
head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esm2mega.convert.files.safetensors_writer import write_sharded
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import safetensors_of, without_shared_prefix
from esm2mega.convert.files.vocabulary import check_vocabulary, write_tokenizer
from esm2mega.convert.formats.hf import SHARD_BYTES, config_of
from esm2mega.convert.lazy_weights import Description, Weights, epsilon_from, flag_from, shape_from
from esm2mega.convert.name_table import (
    CONCATENATED_QKV,
    DIRECT,
    LAYER,
    OUTPUT_BIAS,
    TABLE,
    VOCABULARY,
    NameTable,
    TableRow,
)
from esm2mega.convert.reading import from_store
from esm2mega.convert.writing import OutputReader, outputs
from esm2mega.errors import UserError
from esm2mega.model.esm2 import VOCAB_SIZE

IS_DIRECTORY = True
FAMILIES = ("esm2",)
_LAYER = "model.encoder.layers.{n}."


def _names(interleaved: bool) -> NameTable:
    """Return the table for an order of fused rows: by head if `interleaved`, else all q, all k, all v."""
    qkv = DIRECT if interleaved else CONCATENATED_QKV
    attention, mlp = _LAYER + "self_attention.layernorm_qkv.", _LAYER + "layernorm_mlp."
    return NameTable(
        rows=(
            TableRow(TABLE, "model.embeddings.word_embeddings.weight", VOCABULARY),
            TableRow(LAYER + "self_attention.linear_qkv.layer_norm_{p}", attention + "layer_norm_{p}"),
            TableRow(LAYER + "self_attention.linear_qkv.{p}", attention + "{p}", qkv),
            TableRow(LAYER + "self_attention.linear_proj.{p}", _LAYER + "self_attention.proj.{p}"),
            TableRow(LAYER + "mlp.linear_fc1.layer_norm_{p}", mlp + "layer_norm_{p}"),
            TableRow(LAYER + "mlp.linear_fc1.{p}", mlp + "fc1_{p}"),
            TableRow(LAYER + "mlp.linear_fc2.{p}", mlp + "fc2_{p}"),
            TableRow("encoder.final_layernorm.{p}", "model.encoder.emb_layer_norm_after.{p}"),
            TableRow("lm_head.dense.{p}", "lm_head.dense.{p}"),
            TableRow("lm_head.layer_norm.{p}", "lm_head.decoder.layer_norm_{p}"),
            TableRow(OUTPUT_BIAS, "lm_head.decoder.bias", VOCABULARY),
        ),
        tied={"lm_head.decoder.weight": False},
        dropped={r".*\._extra_state": "a state of Transformer Engine's kernels, empty without FP8"},
    )


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a directory or file whose ``config.json`` names this model type."""
    return source.has_config and source.config.get("model_type") == "nv_esm"


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read a directory of safetensors.

    The names have had the prefix ``model`` since 2026-03, and had ``esm`` before.
    """
    path, config, file = source.path, source.config, source.config_file
    shape = shape_from(
        file, config, "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"
    )
    for key, default, required in (
        ("position_embedding_type", "rotary", "rotary"),
        ("token_dropout", True, True),
        ("encoder_activation", "gelu", "gelu"),
        ("vocab_size", VOCAB_SIZE, VOCAB_SIZE),
    ):
        if config.get(key, default) != required:
            raise UserError(f"{file}: {key} is {config[key]!r}; this version reads {required!r} only")
    check_vocabulary(source.folder)
    stored = safetensors_of(path)
    if stored is None:
        raise UserError(f"{path}: holds no model.safetensors; copy it there")
    # "model." is a part of the names here.
    store, prefix = without_shared_prefix(stored, ("module.", "_orig_mod."))
    names = {
        f"model.{name.removeprefix('esm.')}" if name.startswith("esm.") else name: name
        for name in store.infos
    }
    epsilon = epsilon_from(file, config, "layer_norm_eps", 1e-12)
    description = Description(shape, epsilon, "gelu_tanh")
    table = _names(flag_from(file, config, "qkv_weight_interleaved", True))
    weights = from_store(store, table, description, names, drop, partial)
    weights.notes.dropped += prefix
    return weights


def write(weights: Weights, path: Path) -> None:
    """Write configuration, tensors and tokenizer.

    The code of the model, ``esm_nv.py``, is NVIDIA's and is not written.
    """
    notes = weights.notes
    if weights.description.activation == "gelu":
        notes.changed.append("feed-forward GELU: erf in the source, tanh in Transformer Engine's kernel")
    notes.filled.append("esm_nv.py is not written: copy it from a directory of nvidia/esm2_*")
    table = _names(interleaved=True)
    planned = outputs(weights, table)
    infos = {name: output.info for name, output in planned.items()}
    write_sharded(path, infos, OutputReader(weights, planned), SHARD_BYTES)
    (path / "config.json").write_text(json.dumps(_config(weights.description), indent=2) + "\n")
    write_tokenizer(path)


def _config(description: Description) -> dict[str, Any]:
    classes = {
        "AutoConfig": "esm_nv.NVEsmConfig",
        "AutoModel": "esm_nv.NVEsmModel",
        "AutoModelForMaskedLM": "esm_nv.NVEsmForMaskedLM",
        "AutoModelForTokenClassification": "esm_nv.NVEsmForTokenClassification",
    }
    return {
        **config_of(description),
        "model_type": "nv_esm",
        "architectures": ["NVEsmForMaskedLM"],
        "auto_map": classes,
        "attn_input_format": "bshd",
        "attn_mask_type": "padding",
        "encoder_activation": "gelu",
        "fuse_qkv_params": True,
        "qkv_weight_interleaved": True,
        "max_seq_length": 1026,
        "padded_vocab_size": None,
    }
