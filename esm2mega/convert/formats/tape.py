"""Reads and writes directories of TAPE, a post-LN ``ProteinBertForMaskedLM`` with ``config.json``.

Names are those of tape-proteins 0.5, ``tape/models/modeling_bert.py``. Each LayerNorm there becomes the first
operation of the block that follows it (see `esm2mega.model.proteinbert`). The row of token type 0, which
every sequence has, is added to the positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.convert.files import pickles
from esm2mega.convert.files.iupac import LOST_TOKENS, TAPE_TOKENS, TAPE_VOCABULARY
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import MemoryStore, without_shared_prefix
from esm2mega.convert.heads import tape_heads
from esm2mega.convert.lazy_weights import Description, Weights, epsilon_from, shape_from
from esm2mega.convert.name_table import (
    FINAL_NORM,
    LAYER,
    OUTPUT_BIAS,
    POOLER,
    POSITIONS,
    QKV,
    TABLE,
    NameTable,
    TableRow,
)
from esm2mega.convert.reading import from_store
from esm2mega.convert.writing import tensors_of
from esm2mega.errors import UserError

IS_DIRECTORY = True
FAMILIES = ("proteinbert_postln",)

_LAYER = "bert.encoder.layer.{n}."
# The LayerNorm of the embeddings takes the place of the last LayerNorm of a layer before the first.
_BEFORE, _FIRST = "bert.encoder.layer.-1.output.LayerNorm.", "bert.embeddings.LayerNorm."
POSITION_TABLE = "bert.embeddings.position_embeddings.weight"
TYPE_TABLE = "bert.embeddings.token_type_embeddings.weight"
NAMES = NameTable(
    rows=(
        TableRow(TABLE, "bert.embeddings.word_embeddings.weight", TAPE_VOCABULARY),
        TableRow(POSITIONS, POSITION_TABLE),
        TableRow(
            LAYER + "self_attention.linear_qkv.layer_norm_{p}",
            "bert.encoder.layer.{n-1}.output.LayerNorm.{p}",
        ),
        TableRow(
            LAYER + "self_attention.linear_qkv.{p}",
            tuple(_LAYER + f"attention.self.{x}.{{p}}" for x in ("query", "key", "value")),
            QKV,
        ),
        TableRow(LAYER + "self_attention.linear_proj.{p}", _LAYER + "attention.output.dense.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.layer_norm_{p}", _LAYER + "attention.output.LayerNorm.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.{p}", _LAYER + "intermediate.dense.{p}"),
        TableRow(LAYER + "mlp.linear_fc2.{p}", _LAYER + "output.dense.{p}"),
        TableRow(FINAL_NORM + "{p}", "bert.encoder.layer.{last}.output.LayerNorm.{p}"),
        TableRow("lm_head.dense.{p}", "mlm.transform.dense.{p}"),
        TableRow("lm_head.layer_norm.{p}", "mlm.transform.LayerNorm.{p}"),
        TableRow(OUTPUT_BIAS, "mlm.bias", TAPE_VOCABULARY),
        TableRow(POOLER + "{p}", "bert.pooler.dense.{p}", optional=True),
    ),
    tied={"mlm.decoder.weight": True},
)


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a directory whose tensors have TAPE's names."""
    names = stored_tensors(source.path)[0] if is_tape(source) else ()
    return any(".attention.output.LayerNorm." in name for name in names)


def is_tape(source: SourceFiles) -> bool:
    """Tell whether this is a directory of TAPE, stock or modified, whose configuration has no model type."""
    return source.has_config and _file(source.path).is_file() and "model_type" not in source.config


def _file(path: Path) -> Path:
    """Return the file of tensors: the path itself, or ``pytorch_model.bin`` in the directory that it is."""
    return path / "pytorch_model.bin" if path.is_dir() else path


def stored_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of ``pytorch_model.bin``, and a note if all their names had a prefix.

    Old names of LayerNorms are replaced by new ones, and names of a bare encoder get its prefix.
    """
    file = _file(path)
    stored = MemoryStore(file, pickles.state_dict(file, pickles.load_pickle(file)))
    store, prefix = without_shared_prefix(stored)
    tensors = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): name
        for name in store.infos
    }
    if not any(name.startswith("bert.") for name in tensors):
        # A model without a head, ProteinBertModel, is stored so; readers take either form.
        tensors = {f"bert.{name}": stored_name for name, stored_name in tensors.items()}
    return {name: store.read(stored_name) for name, stored_name in tensors.items()}, prefix


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read a directory of TAPE."""
    path = source.path
    description = replace(describe(source), family="proteinbert_postln")
    tensors, prefix = stored_tensors(path)
    table, description, notes = with_head_of(source, tensors, NAMES, description, "tape")
    names = {name.replace(_FIRST, _BEFORE): name for name in tensors}
    weights = read_folded(path, tensors, names, table, description, drop, partial)
    weights.notes.dropped += prefix
    weights.notes.changed += notes
    return weights


def with_head_of(
    source: SourceFiles, tensors: dict[str, Tensor], table: NameTable, description: Description, name: str
) -> tuple[NameTable, Description, list[str]]:
    """Find which head a directory of stock or modified TAPE holds.

    Args:
        source: The directory.
        tensors: Its tensors by stored name; statistics of batch normalisations are folded, in place.
        table: Name table of a masked language model.
        description: Describes that model.
        name: ``tape`` or ``proteinlm``.

    Returns:
        Name table and description with the head, and notes.
    """
    if any(name.startswith("mlm.") for name in tensors):
        return table, description, []
    found = tape_heads.find_head(source.config_file, tensors, source.config, name)
    if found is None:
        return table.with_head(()), replace(description, head=None), []
    head, described = found
    notes = tape_heads.fold_statistics(head, tensors, source.path)
    return head_table(table, head), replace(description, head=described), notes


def head_table(table: NameTable, head: tape_heads.TapeHead) -> NameTable:
    """Return the name table of a model with the head of a task; it may have BERT's pooler as a part."""
    taken = {row.theirs for row in head.rows}
    rest = NameTable(tuple(row for row in table.rows if row.theirs not in taken), {}, table.dropped)
    return rest.with_head(head.rows)


def describe(source: SourceFiles) -> Description:
    """Read shape and numerics from ``config.json``, with the defaults of ``ProteinBertConfig``.

    Raises:
        UserError: The vocabulary or the activation is another one, or a dimension is absent.
    """
    file, config = source.config_file, source.config
    for key, required in (("vocab_size", len(TAPE_TOKENS)), ("hidden_act", "gelu")):
        if config.get(key, required) != required:
            raise UserError(f"{file}: {key} is {config[key]!r}; this version reads {required!r} only")
    shape = shape_from(
        file, config, "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"
    )
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        raise UserError(f"{file}: max_position_embeddings is {positions!r}, not a positive number")
    return Description(shape, epsilon_from(file, config, "layer_norm_eps", 1e-12), max_positions=positions)


def read_folded(
    path: Path,
    tensors: dict[str, Tensor],
    names: dict[str, str],
    table: NameTable,
    description: Description,
    drop: Sequence[str],
    partial: bool,
) -> Weights:
    """Read a modified or stock model after adding token type 0 to the positions.

    Args:
        path: Directory, named in errors.
        tensors: Tensors by stored name.
        names: Stored names by names of the table.
        table: Name table of the format.
        description: Describes the model.
        drop: Shell patterns of names to leave out.
        partial: As for `from_store`; the masked-language-model head may then be missing altogether.

    Raises:
        UserError: The model does not fit the table.
    """

    note = None
    if TYPE_TABLE in tensors and POSITION_TABLE in tensors:
        types, positions = tensors.pop(TYPE_TABLE), tensors[POSITION_TABLE]
        del names[TYPE_TABLE]
        if types.dim() != 2 or types.shape[1:] != positions.shape[1:]:
            raise UserError(f"{path}: {TYPE_TABLE} has shape {list(types.shape)}, which does not fit")
        tensors[POSITION_TABLE] = positions + types[0]
        note = f"{TYPE_TABLE}: row 0 is added to the positions, others are for second sentences"
    weights = from_store(MemoryStore(path, tensors), table, description, names, drop, partial)
    if note is not None:
        weights.notes.dropped.append(note)
    return weights


def write(weights: Weights, path: Path) -> None:
    """Write a directory that ``from_pretrained`` of the model's class loads.

    The positions include the token type.
    """
    write_directory(weights, path, NAMES, "tape", {})


def write_directory(weights: Weights, path: Path, table: NameTable, name: str, extra: dict[str, Any]) -> None:
    """Write tensors and configuration of a stock or modified TAPE model.

    Args:
        weights: The model.
        path: An existing, empty directory.
        table: Name table of a masked language model.
        name: ``tape`` or ``proteinlm``.
        extra: Further keys of the configuration.
    """
    shape, width = weights.description.shape, weights.description.shape.hidden_size
    described, statistics = weights.description.task, {}
    if described is not None:
        head = tape_heads.equal_head(described, name)
        table = head_table(table, head)
        extra = {**extra, **tape_heads.config_of_head(described)}
        if described.task.dropout != head.dropout:
            weights.notes.dropped.append(
                f"task.dropout={described.task.dropout}: the head of {name} has {head.dropout}"
            )
    elif weights.description.head is None:
        table = table.with_head(())
    tensors = {key.replace(_BEFORE, _FIRST): value for key, value in tensors_of(weights, table)}
    if described is not None:
        statistics = tape_heads.statistics(head, tensors)
    weights.notes.dropped.append(LOST_TOKENS)
    weights.notes.filled.append("token types: zeros, since the positions include them")
    if weights.description.activation != "gelu":
        weights.notes.changed.append("feed-forward GELU: tanh in the source, erf in TAPE")
    types = extra.get("type_vocab_size", 2)
    tensors[TYPE_TABLE] = torch.zeros(types, width, dtype=weights.description.dtype)
    # clone: parts of one fused tensor would each store all of it
    state = {key: value.clone() for key, value in {**tensors, **statistics}.items()}
    pickles.save_pickle(path / "pytorch_model.bin", state)
    config = {
        "vocab_size": len(TAPE_TOKENS),
        "hidden_size": width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": shape.ffn_hidden_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": weights.description.max_positions,
        "type_vocab_size": types,
        "initializer_range": 0.02,
        "layer_norm_eps": weights.description.layernorm_epsilon,
        "base_model": "transformer",
        "finetuning_task": None,
        "num_labels": 2,
        "output_attentions": False,
        "output_hidden_states": False,
        "torchscript": False,
        **extra,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
