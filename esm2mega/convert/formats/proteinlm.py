"""Reads and writes directories of ProteinLM's own TAPE, a modified, pre-LN ``ProteinBertForMaskedLM``.

Names are those of THUDM/ProteinLM, ``tape/tape/models/modeling_bert.py``. Its forward pass evaluates the
final LayerNorm and discards the result, so such a model has `model.final_layernorm` off and keeps that
LayerNorm beside the weights; one that was trained here has none, and is written with scale 1 and shift 0.
Checkpoints that Megatron-LM itself wrote are read by
`esm2mega.convert.formats.megatron`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.files.iupac import TAPE_VOCABULARY
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.formats.tape import (
    POSITION_TABLE,
    describe,
    is_tape,
    read_folded,
    stored_tensors,
    with_head_of,
    write_directory,
)
from esm2mega.convert.lazy_weights import Weights
from esm2mega.convert.name_table import (
    FINAL_NORM,
    LAYER,
    OUTPUT_BIAS,
    POSITIONS,
    QKV,
    TABLE,
    NameTable,
    TableRow,
)

IS_DIRECTORY = True
FAMILIES = ("proteinbert_preln",)

_LAYER = "bert.encoder.layer.{n}."
NAMES = NameTable(
    rows=(
        TableRow(TABLE, "bert.embeddings.word_embeddings.weight", TAPE_VOCABULARY),
        TableRow(POSITIONS, POSITION_TABLE),
        TableRow(LAYER + "self_attention.linear_qkv.layer_norm_{p}", _LAYER + "input_ln.{p}"),
        TableRow(
            LAYER + "self_attention.linear_qkv.{p}",
            tuple(_LAYER + f"attention.self.{x}.{{p}}" for x in ("query", "key", "value")),
            QKV,
        ),
        TableRow(LAYER + "self_attention.linear_proj.{p}", _LAYER + "attention.dense.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.layer_norm_{p}", _LAYER + "post_attn_ln.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.{p}", _LAYER + "mlp.dense_h_4h.{p}"),
        TableRow(LAYER + "mlp.linear_fc2.{p}", _LAYER + "mlp.dense_4h_h.{p}"),
        TableRow(FINAL_NORM + "{p}", "bert.encoder.final_ln.{p}"),
        TableRow("lm_head.dense.{p}", "mlm.transform.dense.{p}"),
        TableRow("lm_head.layer_norm.{p}", "mlm.transform.LayerNorm.{p}"),
        TableRow(OUTPUT_BIAS, "mlm.bias", TAPE_VOCABULARY),
    ),
    # Published files have a template's random decoder here, which overwrites the table when loaded.
    tied={"mlm.decoder.weight": True},
    dropped={r"bert\.(encoder\.)?bert_tail_dense\.(weight|bias)": "nothing computes with it"},
)


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a directory whose tensors have these names."""
    return is_tape(source) and any(".input_ln." in name for name in stored_tensors(source.path)[0])


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read a directory of ProteinLM."""
    path = source.path
    description = replace(describe(source), family="proteinbert_preln", final_layernorm=False)
    tensors, prefix = stored_tensors(path)
    table, description, notes = with_head_of(source, tensors, NAMES, description, "proteinlm")
    names = {name: name for name in tensors}
    weights = read_folded(path, tensors, names, table, description, drop, partial)
    weights.notes.dropped += prefix
    weights.notes.changed += notes
    return _without_idle_norm(weights)


_SCALE, _SHIFT = f"{FINAL_NORM}weight", f"{FINAL_NORM}bias"


def _without_idle_norm(weights: Weights) -> Weights:
    """Leave out a final LayerNorm of scale 1 and shift 0, which stands for none; keep any other."""
    is_whole = {_SCALE, _SHIFT} <= weights.infos.keys()  # of a part of a model it may not be
    if not is_whole or bool((weights.read(_SCALE) == 1).all()) and not bool(weights.read(_SHIFT).any()):
        if is_whole:
            weights.notes.dropped.append("bert.encoder.final_ln: scale 1 and shift 0, which stand for none")
        infos = {name: info for name, info in weights.infos.items() if name not in (_SCALE, _SHIFT)}
        return replace(weights, infos=infos)
    weights.notes.kept.append(
        "the final LayerNorm is stored and not applied, as in ProteinLM's own forward pass"
    )
    return weights


def _with_idle_norm(weights: Weights) -> Weights:
    """Add the final LayerNorm that readers expect to a model that has none."""
    if _SCALE in weights.infos:
        return weights
    weights.notes.filled.append(
        "bert.encoder.final_ln: scale 1 and shift 0, which ProteinLM's reader computes and throws away"
    )
    shape, dtype, read = weights.description.shapes[_SCALE], weights.description.dtype, weights.read
    idle = {_SCALE: torch.ones(shape, dtype=dtype), _SHIFT: torch.zeros(shape, dtype=dtype)}
    infos = {**weights.infos, **{name: TensorInfo(shape, dtype) for name in idle}}
    return replace(weights, infos=infos, read=lambda name: idle[name] if name in idle else read(name))


def write(weights: Weights, path: Path) -> None:
    """Write a directory that ``from_pretrained`` of the model's class in ProteinLM loads."""
    if weights.description.final_layernorm:
        weights.notes.changed.append(
            "the final LayerNorm: applied in the source, computed and thrown away by ProteinLM's reader; a "
            "model trained with model.final_layernorm=false is written exactly"
        )
    weights.notes.filled.append("bert_tail_dense is not written: nothing computes with it")
    extra = {"type_vocab_size": 1, "pruned_heads": {}}
    write_directory(_with_idle_norm(weights), path, NAMES, "proteinlm", extra)
