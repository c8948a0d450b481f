"""Defines the name table of a format: one row for each kind of tensor, read in both directions.

Our side of every table has the names of a checkpoint's whole tensors with the layer number written out. The
token table and the output bias have 33 rows, and the auxiliary tensors are included (see
`esm2mega.checkpoint.auxiliary`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esm2mega.config.presets import ModelShape
from esm2mega.convert import tensors
from esm2mega.errors import UserError
from esm2mega.model.esm2 import VOCAB_SIZE

TABLE = "embedding.word_embeddings.weight"
OUTPUT_BIAS = "output_layer.bias"
FREQUENCIES = "rotary.inv_freq"
CONTACT_HEAD = "contact_head.regression."
LM_HEAD = "lm_head."
POSITIONS = "embedding.position_embeddings.weight"
POOLER = "pooler.dense."
FINAL_NORM = "encoder.final_layernorm."
LAYER = "encoder.layers.{n}."
BODY = (
    LAYER + "self_attention.linear_qkv.layer_norm_{p}",
    LAYER + "self_attention.linear_qkv.{p}",
    LAYER + "self_attention.linear_proj.{p}",
    LAYER + "mlp.linear_fc1.layer_norm_{p}",
    LAYER + "mlp.linear_fc1.{p}",
    LAYER + "mlp.linear_fc2.{p}",
    FINAL_NORM + "{p}",
    LM_HEAD + "dense.{p}",
    LM_HEAD + "layer_norm.{p}",
)
"""These names, those of Megatron-Core, are in every model, beside its token table and output bias."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """Converts a tensor of ours to its parts in another format, and the parts to our tensor.

    Attributes:
        to_ours: Makes our tensor from the parts, in the order of the row, and the dimensions of the model.
        to_theirs: Makes the parts from our tensor, the dimensions of the model and the number of parts.
        part_shape: Returns the shape of every part for the shape of our tensor.
        least_rows: Least number of rows of a part; rows beyond those of the vocabulary are padding and cut
            off. None: a part has exactly the shape that `part_shape` returns.
    """

    to_ours: Callable[[Sequence[Tensor], ModelShape], Tensor]
    to_theirs: Callable[[Tensor, ModelShape, int], Sequence[Tensor]]
    part_shape: Callable[[Shape], Shape] = lambda shape: shape
    least_rows: int | None = None


def _same(parts: Sequence[Tensor], _: ModelShape) -> Tensor:
    if not tensors.same_values(parts):
        raise UserError(
            "the rotary frequencies differ between layers; this model has one set for all of them"
        )
    return parts[0]


def _interleave(qkv: Sequence[Tensor], shape: ModelShape) -> Sequence[Tensor]:
    q, k, v = qkv
    heads = shape.num_attention_heads
    return tensors.interleave_rotary(q, heads), tensors.interleave_rotary(k, heads), v


def _separate(qkv: Sequence[Tensor], shape: ModelShape) -> Sequence[Tensor]:
    q, k, v = qkv
    heads = shape.num_attention_heads
    return tensors.separate_rotary(q, heads), tensors.separate_rotary(k, heads), v


def _fuse(qkv: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return tensors.fuse_qkv(qkv[0], qkv[1], qkv[2], shape.num_attention_heads)


def _split(qkv: Tensor, shape: ModelShape) -> Sequence[Tensor]:
    return tensors.split_qkv(qkv, shape.num_attention_heads)


def _third(shape: Shape) -> Shape:
    return (shape[0] // 3, *shape[1:])


DIRECT = Kind(lambda parts, _: parts[0], lambda value, _, __: [value])
"""The tensor is the same on both sides."""

VOCABULARY = Kind(
    lambda parts, _: tensors.cut_vocabulary(parts[0]), lambda value, _, __: [value], least_rows=VOCAB_SIZE
)
"""Rows beyond the 33 tokens are padding: cut when read, none when written."""


def padded_vocabulary(num_rows: int, fill: float = 0.0) -> Kind:
    """Return the kind of a vocabulary with padding, which is cut when read, and written as `fill`.

    Args:
        num_rows: Number of rows that are written, those of the 33 tokens included.
        fill: Value of all elements of the padding.
    """
    return Kind(
        lambda parts, _: tensors.cut_vocabulary(parts[0]),
        lambda value, _, __: [tensors.pad_vocabulary(value, num_rows, fill)],
        part_shape=lambda shape: (num_rows, *shape[1:]),
        least_rows=VOCAB_SIZE,
    )


QKV = Kind(_fuse, lambda value, shape, _: _split(value, shape), _third)
"""The other format has three projections, ours has one that is fused head-major."""

INTERLEAVED_QKV = Kind(
    lambda parts, shape: _fuse(_separate(parts, shape), shape),
    lambda value, shape, _: _interleave(_split(value, shape), shape),
    _third,
)
"""The other format has three projections as for `QKV`, with rotary pairs in neighbouring channels."""

CONCATENATED_QKV = Kind(
    lambda parts, shape: _fuse(parts[0].chunk(3), shape),
    lambda value, shape, _: [torch.cat(list(_split(value, shape)))],
)
"""The other format has one projection with the rows ``q`` of all heads, then ``k``, then ``v``."""

REPEATED = Kind(_same, lambda value, _, count: [value] * count)
"""Every layer of the other format repeats what is one tensor in ours."""


@dataclass(frozen=True)
class TableRow:
    """Holds one row of a name table: a pattern of names on each side.

    ``{n}`` stands for the layer and ``{p}`` for ``weight`` and ``bias``; on the side of the other format,
    ``{n-1}`` stands for the layer before and ``{last}`` for the last layer.

    Attributes:
        ours: Our name.
        theirs: Name or names of the parts in the other format. If only this side has ``{n}``, all layers are
            parts.
        kind: How the values change.
        optional: Whether a checkpoint without it is complete.
    """

    ours: str
    theirs: str | tuple[str, ...]
    kind: Kind = DIRECT
    optional: bool = False


@dataclass(frozen=True)
class TableEntry:
    """Holds a row of a name table with its placeholders filled."""

    ours: str
    theirs: tuple[str, ...]
    kind: Kind
    optional: bool


@dataclass(frozen=True)
class NameTable:
    """Holds all rows of a format, and the other tensors that its files may hold.

    Attributes:
        rows: The rows of the table.
        tied: Names, in the other format, of tensors that must equal the token table; whether the format
            stores them.
        dropped: Regular expressions for names in the other format without a place here; why that is no loss.
    """

    rows: tuple[TableRow, ...]
    tied: dict[str, bool] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def entries(self, shape: ModelShape) -> list[TableEntry]:
        """Return the table for a model of `shape`, in the order of the layers."""
        rows = [
            TableRow(row.ours.replace("{p}", p), _fill(row.theirs, "{p}", p), row.kind, row.optional)
            for row in self.rows
            for p in (("weight", "bias") if "{p}" in row.ours else ("",))
        ]
        layered = [row for row in rows if "{n}" in row.ours]
        entries = [
            TableEntry(
                row.ours.replace("{n}", str(n)),
                _fill(_fill(row.theirs, "{n}", str(n)), "{n-1}", str(n - 1)),
                row.kind,
                row.optional,
            )
            for n in range(shape.num_layers)
            for row in layered
        ]
        for row in rows:
            if "{n}" not in row.ours:
                parts = [
                    part.replace("{n}", str(n))
                    for part in _fill(row.theirs, "{last}", str(shape.num_layers - 1))
                    for n in (range(shape.num_layers) if "{n}" in part else (0,))
                ]
                entries.append(TableEntry(row.ours, tuple(parts), row.kind, row.optional))
        return entries

    def with_head(self, rows: Sequence[TableRow]) -> NameTable:
        """Replace the rows of the masked-language-model head by `rows`, without tensors tied to the table."""
        encoder = tuple(row for row in self.rows if not is_lm_head(row.ours))
        return NameTable((*encoder, *rows), {}, self.dropped)

    def reason_to_drop(self, name: str) -> str | None:
        """Return why the tensor `name` is left out, or None if nothing is known about it."""
        return next((why for pattern, why in self.dropped.items() if re.fullmatch(pattern, name)), None)


def _names(theirs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (theirs,) if isinstance(theirs, str) else theirs


def _fill(theirs: str | tuple[str, ...], placeholder: str, value: str) -> tuple[str, ...]:
    return tuple(name.replace(placeholder, value) for name in _names(theirs))


def is_lm_head(name: str) -> bool:
    """Tell whether a tensor of ours is in the masked-language-model head, apart from its tied decoder."""
    return name.startswith(LM_HEAD) or name == OUTPUT_BIAS


def our_shapes(shape: ModelShape, max_positions: int | None = None) -> dict[str, Shape]:
    """Return the shape of every tensor of a masked language model, under our names.

    Tensors that are kept beside the model are included; the vocabulary has 33 rows.

    Args:
        shape: Dimensions of the model.
        max_positions: Rows of the table of learned positions; None for ESM-2, which has rotary positions.
    """
    layers, h, f, heads = shape
    shapes: dict[str, Shape] = {TABLE: (VOCAB_SIZE, h)}
    for n in range(layers):
        attention, mlp = f"encoder.layers.{n}.self_attention.", f"encoder.layers.{n}.mlp."
        shapes |= {
            f"{attention}linear_qkv.layer_norm_weight": (h,),
            f"{attention}linear_qkv.layer_norm_bias": (h,),
            f"{attention}linear_qkv.weight": (3 * h, h),
            f"{attention}linear_qkv.bias": (3 * h,),
            f"{attention}linear_proj.weight": (h, h),
            f"{attention}linear_proj.bias": (h,),
            f"{mlp}linear_fc1.layer_norm_weight": (h,),
            f"{mlp}linear_fc1.layer_norm_bias": (h,),
            f"{mlp}linear_fc1.weight": (f, h),
            f"{mlp}linear_fc1.bias": (f,),
            f"{mlp}linear_fc2.weight": (h, f),
            f"{mlp}linear_fc2.bias": (h,),
        }
    for norm in ("encoder.final_layernorm", "lm_head.layer_norm"):
        shapes |= {f"{norm}.weight": (h,), f"{norm}.bias": (h,)}
    shapes |= {"lm_head.dense.weight": (h, h), "lm_head.dense.bias": (h,), OUTPUT_BIAS: (VOCAB_SIZE,)}
    if max_positions is None:
        shapes |= {FREQUENCIES: (h // heads // 2,)}
        shapes |= {f"{CONTACT_HEAD}weight": (1, layers * heads), f"{CONTACT_HEAD}bias": (1,)}
    else:
        shapes |= {POSITIONS: (max_positions, h)}
        shapes |= {f"{POOLER}weight": (h, h), f"{POOLER}bias": (h,)}
    return shapes
