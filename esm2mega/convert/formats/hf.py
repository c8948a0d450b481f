"""Reads and writes directories of Hugging Face: an ``EsmForMaskedLM`` or a classification model.

Names and config keys are those of transformers 4.30 to 5.23, ``models/esm/modeling_esm.py``. transformers up
to 5.5 stores rotary frequencies in every layer, later versions once under a name with a literal asterisk.
Both are read; copies in every layer are written, which all versions read. transformers 5.23 also writes the
LayerNorms of the layers as ``gamma`` and ``beta``, the names of the first BERT.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from esm2mega.config.architecture import DEFAULT_EPSILON, DIMENSIONS, check_esm2
from esm2mega.config.presets import ModelShape
from esm2mega.convert.files import pickles
from esm2mega.convert.files.foreign import named_by_config
from esm2mega.convert.files.safetensors_writer import write_sharded
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import (
    MemoryStore,
    TensorStore,
    safetensors_of,
    shards,
    without_shared_prefix,
)
from esm2mega.convert.files.vocabulary import check_vocabulary, write_tokenizer
from esm2mega.convert.heads.hf_classifiers import (
    config_of_head,
    find_head,
    head_notes,
    head_rows,
)
from esm2mega.convert.heads.plain_head import CONFIG_FILE, HEAD_FILE
from esm2mega.convert.lazy_weights import (
    Description,
    Weights,
    dtype_name,
    epsilon_from,
    flag_from,
    shape_from,
)
from esm2mega.convert.name_table import (
    CONTACT_HEAD,
    FREQUENCIES,
    LAYER,
    LM_HEAD,
    OUTPUT_BIAS,
    POOLER,
    QKV,
    REPEATED,
    TABLE,
    NameTable,
    TableRow,
)
from esm2mega.convert.reading import from_store
from esm2mega.convert.writing import OutputReader, outputs, with_contact_head, with_zeros
from esm2mega.errors import UserError
from esm2mega.model.esm2 import VOCAB_SIZE
from esm2mega.vocabulary import EOS, MASK, PAD

IS_DIRECTORY = True
FAMILIES = ("esm2",)
SHARD_BYTES = 5 * 10**9
"""This is the size in bytes of the largest file, as in transformers 4."""

_LAYER = "esm.encoder.layer.{n}."
_FREQUENCIES = "attention.self.rotary_embeddings.inv_freq"
_OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_DECODER = "lm_head.decoder.weight"
_OTHER_FREQUENCIES = (f"esm.encoder.layer.*.{_FREQUENCIES}", "esm.rotary_embeddings.inv_freq")

NAMES = NameTable(
    rows=(
        TableRow(TABLE, "esm.embeddings.word_embeddings.weight"),
        # attention.LayerNorm stands before attention, the layer's own LayerNorm before the feed-forward part
        TableRow(LAYER + "self_attention.linear_qkv.layer_norm_{p}", _LAYER + "attention.LayerNorm.{p}"),
        TableRow(
            LAYER + "self_attention.linear_qkv.{p}",
            tuple(_LAYER + f"attention.self.{x}.{{p}}" for x in ("query", "key", "value")),
            QKV,
        ),
        TableRow(LAYER + "self_attention.linear_proj.{p}", _LAYER + "attention.output.dense.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.layer_norm_{p}", _LAYER + "LayerNorm.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.{p}", _LAYER + "intermediate.dense.{p}"),
        TableRow(LAYER + "mlp.linear_fc2.{p}", _LAYER + "output.dense.{p}"),
        TableRow("encoder.final_layernorm.{p}", "esm.encoder.emb_layer_norm_after.{p}"),
        TableRow("lm_head.dense.{p}", "lm_head.dense.{p}"),
        TableRow("lm_head.layer_norm.{p}", "lm_head.layer_norm.{p}"),
        TableRow(OUTPUT_BIAS, "lm_head.bias"),
        TableRow(FREQUENCIES, _LAYER + _FREQUENCIES, REPEATED, optional=True),
        TableRow(CONTACT_HEAD + "{p}", "esm.contact_head.regression.{p}", optional=True),
    ),
    tied={_DECODER: False},
    dropped={
        r"esm\.embeddings\.position_ids": "a counter that readers make themselves",
        r"esm\.embeddings\.position_embeddings\.weight": "not used with rotary positions",
        r"esm\.pooler\.dense\.(weight|bias)": "the pooler, which nothing here computes with",
    },
)


def matches(source: SourceFiles) -> bool:
    """Tell whether the ``config.json`` of a directory, or beside a file, names this model type."""
    return source.has_config and source.config.get("model_type") == "esm"


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read a directory of safetensors (also sharded) or ``pytorch_model.bin``, or a single such file."""
    path, config = source.path, source.config
    description = describe(source.config_file, config)
    check_vocabulary(source.folder)
    store, prefix = without_shared_prefix(open_tensors(path))
    names = _normal_names(store, description.shape)
    tied = flag_from(source.config_file, config, "tie_word_embeddings", True)
    if not partial and not tied and _DECODER not in names and f"{LM_HEAD}bias" in names:
        raise UserError(
            f"{path}: tie_word_embeddings is false and {_DECODER} is missing, so readers draw it at random; "
            "copy all tensors, or correct config.json if the token table is the decoder"
        )
    if not any(name.startswith(LM_HEAD) for name in names):
        description = replace(description, head=find_head(source.config_file, store.infos, config))
    weights = from_store(store, _table(description), description, names, drop, partial)
    weights.notes.dropped += prefix
    if (head := description.task) is not None:
        weights.notes.filled += head_notes(head, config)
    elif (source.folder / CONFIG_FILE).is_file():
        weights.notes.dropped.append(
            f"{CONFIG_FILE} and {HEAD_FILE}: the head of a task, which `convert` writes and does not read"
        )
    return weights


def _table(description: Description) -> NameTable:
    """Return the name table of a model with the head of `description`."""
    if description.head == "lm":
        return NAMES
    return NAMES.with_head(() if description.task is None else head_rows(description.task))


def describe(file: Path, config: dict[str, Any]) -> Description:
    """Read shape and numerics from a config, with the defaults of `EsmConfig` for absent keys.

    Raises:
        UserError: A dimension is absent, or the model is not an ESM-2.
    """
    check_esm2(file, config, named_by_config(config))
    shape = shape_from(file, config, *DIMENSIONS)
    return Description(shape, epsilon_from(file, config, "layer_norm_eps", DEFAULT_EPSILON))


def open_tensors(path: Path) -> TensorStore:
    """Open the tensors of a file, or of a directory of transformers with any of the four forms of storage."""
    store = safetensors_of(path)
    if store is not None:
        return store
    if path.is_file():
        return MemoryStore(path, pickles.state_dict(path, pickles.load_pickle(path)))
    directory = path
    single, index = directory / "pytorch_model.bin", directory / "pytorch_model.bin.index.json"
    files = [single] if single.is_file() else shards(index) if index.is_file() else []
    if not files:
        raise UserError(f"{directory}: holds neither model.safetensors nor pytorch_model.bin; copy one there")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = pickles.state_dict(file, pickles.load_pickle(file))
        if repeated := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{file}: holds {repeated[0]}, as another shard does; download them again")
        tensors |= found
    return MemoryStore(directory, tensors)


def _normal_names(store: TensorStore, shape: ModelShape) -> dict[str, str]:
    """Return stored names by names of the table, which differ in prefixes, spellings and frequencies."""
    bare = not any(name.startswith("esm.") for name in store.infos)
    heads = (LM_HEAD, "classifier.")
    names: dict[str, str] = {}
    for stored in store.infos:
        name = f"esm.{stored}" if bare and not stored.startswith(heads) else stored
        for old, new in _OLD_NORM.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if name in names:
            raise UserError(f"{store.location}: holds {name} twice, as {names[name]} and as {stored}")
        names[name] = stored
    for once in _OTHER_FREQUENCIES:
        if once in names:
            stored = names.pop(once)
            layers = range(min(shape.num_layers, len(store.infos)))
            names |= {_LAYER.format(n=n) + _FREQUENCIES: stored for n in layers}
    return names


def write(weights: Weights, path: Path) -> None:
    """Write a directory that ``AutoModelForMaskedLM`` and ``AutoTokenizer`` load without a network."""
    if weights.description.activation != "gelu":
        weights.notes.changed.append("feed-forward GELU: tanh in the source, erf in EsmForMaskedLM")
    description, table = weights.description, _table(weights.description)
    config, weights = config_of(description), with_contact_head(weights)
    if (head := description.task) is not None:
        config |= config_of_head(head)
        if head.task.dropout:
            weights.notes.dropped.append(
                f"task.dropout={head.task.dropout}: hidden_dropout_prob is the encoder's too, and is 0"
            )
    elif description.head is None:
        config["architectures"] = ["EsmModel"]
        h = description.shape.hidden_size
        weights.notes.filled.append("pooler: zeros, the source has none")
        weights = with_zeros(weights, {f"{POOLER}weight": (h, h), f"{POOLER}bias": (h,)})
        table = NAMES.with_head((TableRow(POOLER + "{p}", "esm.pooler.dense.{p}"),))
    planned = outputs(weights, table)
    infos = {name: output.info for name, output in planned.items()}
    write_sharded(path, infos, OutputReader(weights, planned), SHARD_BYTES)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(path)


def config_of(description: Description) -> dict[str, Any]:
    """Return ``config.json`` of a masked language model, with all keys whose default is not that of ESM-2."""
    shape = description.shape
    return {
        "architectures": ["EsmForMaskedLM"],
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": None,
        "emb_layer_norm_before": False,
        "esmfold_config": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_hidden_size,
        "is_folding_model": False,
        "layer_norm_eps": description.layernorm_epsilon,
        "eos_token_id": EOS,
        "mask_token_id": MASK,
        "max_position_embeddings": 1026,
        "model_type": "esm",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "pad_token_id": PAD,
        "position_embedding_type": "rotary",
        "tie_word_embeddings": True,
        "token_dropout": True,
        "torch_dtype": dtype_name(description.dtype),
        "use_cache": True,
        "vocab_list": None,
        "vocab_size": VOCAB_SIZE,
    }
