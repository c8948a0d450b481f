"""Reads tensors for a verification by their stored names, rounded and cast on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.convert.verify.plain_model import Affine

Prepare = Callable[[Tensor], Tensor]
"""A function of this type rounds a weight and casts it to the dtype to compute in; frequencies are exempt."""


class WeightSource:
    """Reads weights and biases by name, and prepares them."""

    def __init__(self, get: Callable[[str], Tensor], prepare: Prepare) -> None:
        self._get = get
        self._prepare = prepare

    def tensor(self, name: str) -> Tensor:
        return self._prepare(self._get(name))

    def affine(self, name: str, weight: str = ".weight", bias: str = ".bias") -> Affine:
        return Affine(self.tensor(name + weight), self.tensor(name + bias))


def by_head(fused: Affine, heads: int) -> tuple[Affine, Affine, Affine]:
    """Select q, k and v from the rows ``head 0: q k v, head 1: q k v, …``."""
    width = fused.weight.shape[1] // heads
    rows = torch.arange(3 * heads * width).reshape(heads, 3, width)
    q, k, v = (Affine(fused.weight[r], fused.bias[r]) for r in (rows[:, i].flatten() for i in range(3)))
    return q, k, v


def json_config(path: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` of a directory, or beside a file."""
    folder = path.parent if path.is_file() else path
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
