"""Joins Megatron-LM's language models, which are stored in one file per rank.

Tensor-parallel pieces are joined, and the layers of pipeline stages are renumbered. Names and axes are those
of Megatron-LM before Megatron-Core, and of NeMo 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.name_table import FINAL_NORM, LAYER, OUTPUT_BIAS, TABLE, Kind, TableRow
from esm2mega.convert.tensors import same_values
from esm2mega.errors import UserError

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_SPLIT_AXES = {
    r".*word_embeddings(_for_head)?\.weight|.*output_layer\.weight|lm_head\.bias": 0,
    r".*\.(query_key_value|dense_h_to_4h)\.(weight|bias)": 0,
    r".*\.(self_attention\.dense|dense_4h_to_h)\.weight": 1,
}
"""Pieces of tensors with these names are joined along this axis; all other tensors are equal on all ranks."""


def megatron_rows(vocabulary: Kind) -> tuple[TableRow, ...]:
    """Return the rows of what every model has, with this kind of token table and output bias."""
    encoder = "language_model.encoder."
    layer = encoder + "layers.{n}."
    return (
        TableRow(TABLE, "language_model.embedding.word_embeddings.weight", vocabulary),
        TableRow(LAYER + "self_attention.linear_qkv.layer_norm_{p}", layer + "input_layernorm.{p}"),
        TableRow(LAYER + "self_attention.linear_qkv.{p}", layer + "self_attention.query_key_value.{p}"),
        TableRow(LAYER + "self_attention.linear_proj.{p}", layer + "self_attention.dense.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.layer_norm_{p}", layer + "post_attention_layernorm.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.{p}", layer + "mlp.dense_h_to_4h.{p}"),
        TableRow(LAYER + "mlp.linear_fc2.{p}", layer + "mlp.dense_4h_to_h.{p}"),
        TableRow(FINAL_NORM + "{p}", encoder + "final_layernorm.{p}"),
        TableRow("lm_head.dense.{p}", "lm_head.dense.{p}"),
        TableRow("lm_head.layer_norm.{p}", "lm_head.layernorm.{p}"),
        TableRow(OUTPUT_BIAS, "lm_head.bias", vocabulary),
    )


class RankStore:
    """Reads the tensors of a whole model from those of all ranks."""

    def __init__(self, location: Path, stages: Sequence[Sequence[Mapping[str, Tensor]]]) -> None:
        """Collect the names and whole shapes of the tensors.

        Args:
            location: File or directory, named in errors.
            stages: For each pipeline stage, the tensors of each of its tensor-parallel ranks. Layers are
                numbered from 0 in every stage.
        """
        self.location = location
        self._pieces: dict[str, list[Tensor]] = {}
        first_layer = 0
        for stage in stages:
            names = set(stage[0])
            if any(set(rank) != names for rank in stage):
                raise UserError(
                    f"{location}: the tensor-parallel ranks hold different tensors; copy all ranks again"
                )
            numbers = [int(match[2]) for name in names if (match := _LAYER.fullmatch(name))]
            for name in stage[0]:
                self._add(_renumbered(name, first_layer), [rank[name] for rank in stage])
            first_layer += max(numbers, default=-1) + 1
        self.infos = {name: self._info(name, pieces) for name, pieces in self._pieces.items()}

    def _add(self, name: str, pieces: list[Tensor]) -> None:
        if name not in self._pieces:
            self._pieces[name] = pieces
        elif not all(same_values(pair) for pair in zip(self._pieces[name], pieces, strict=True)):
            raise UserError(f"{self.location}: {name} differs between pipeline stages; copy all ranks again")

    def _info(self, name: str, pieces: Sequence[Tensor]) -> TensorInfo:
        shape, axis = list(pieces[0].shape), _axis(name)
        if any(piece.shape != pieces[0].shape for piece in pieces) or len(shape) <= (axis or 0):
            raise UserError(f"{self.location}: {name} does not fit together from its tensor-parallel pieces")
        if axis is not None:
            shape[axis] *= len(pieces)
        return TensorInfo(tuple(shape), pieces[0].dtype)

    def read(self, name: str) -> Tensor:
        pieces, axis = self._pieces[name], _axis(name)
        if axis is not None:
            return torch.cat(pieces, dim=axis)
        if not same_values(pieces):
            raise UserError(f"{self.location}: {name} differs between tensor-parallel ranks; copy all again")
        return pieces[0]


def _axis(name: str) -> int | None:
    return next((axis for pattern, axis in _SPLIT_AXES.items() if re.fullmatch(pattern, name)), None)


def _renumbered(name: str, first_layer: int) -> str:
    return _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + first_layer}{match[3]}", name)
