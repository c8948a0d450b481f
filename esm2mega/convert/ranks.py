"""Checkpoints that hold one file per rank: tensor-parallel pieces joined, pipeline stages renumbered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.tensors import same_values
from esm2mega.errors import UserError

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


class RankStore:
    """The whole model out of the tensors of all ranks."""

    def __init__(
        self, place: Path, stages: Sequence[Sequence[Mapping[str, Tensor]]], axes: Mapping[str, int]
    ) -> None:
        """Put names and shapes together.

        Args:
            place: Named in errors.
            stages: For each pipeline stage, the tensors of each of its tensor-parallel ranks. Layers are
                numbered from 0 in every stage.
            axes: Regular expressions of names whose pieces are joined, and along which axis. The pieces of
                all others must be equal.
        """
        self.place = place
        self._axes = axes
        self._pieces: dict[str, list[Tensor]] = {}
        first_layer = 0
        for stage in stages:
            names = set(stage[0])
            if any(set(rank) != names for rank in stage):
                raise UserError(f"{place}: the tensor-parallel ranks do not hold the same tensors")
            numbers = [int(match[2]) for name in names if (match := _LAYER.fullmatch(name))]
            for name in stage[0]:
                self._add(_renumbered(name, first_layer), [rank[name] for rank in stage])
            first_layer += max(numbers, default=-1) + 1
        self.infos = {name: self._info(name, pieces) for name, pieces in self._pieces.items()}

    def _add(self, name: str, pieces: list[Tensor]) -> None:
        if name not in self._pieces:
            self._pieces[name] = pieces
        elif not all(same_values(pair) for pair in zip(self._pieces[name], pieces, strict=True)):
            raise UserError(f"{self.place}: {name} differs between pipeline stages")

    def _axis(self, name: str) -> int | None:
        return next((axis for pattern, axis in self._axes.items() if re.fullmatch(pattern, name)), None)

    def _info(self, name: str, pieces: Sequence[Tensor]) -> TensorInfo:
        shape, axis = list(pieces[0].shape), self._axis(name)
        if any(piece.shape != pieces[0].shape for piece in pieces) or len(shape) <= (axis or 0):
            raise UserError(f"{self.place}: {name} does not fit together from its tensor-parallel pieces")
        if axis is not None:
            shape[axis] *= len(pieces)
        return TensorInfo(tuple(shape), pieces[0].dtype)

    def read(self, name: str) -> Tensor:
        pieces, axis = self._pieces[name], self._axis(name)
        if axis is not None:
            return torch.cat(pieces, dim=axis)
        if not same_values(pieces):
            raise UserError(f"{self.place}: {name} differs between tensor-parallel ranks")
        return pieces[0]


def _renumbered(name: str, first_layer: int) -> str:
    return _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + first_layer}{match[3]}", name)
