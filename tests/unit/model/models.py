"""A small model whose every parameter matters, and what one pack gives, for tests of single parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.config.schema import ParallelConfig
from esm2mega.model.build import build_model
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from tests.unit.runs import tiny_run


def random_model(**changes: Any) -> ESM2Model:
    """Three layers in fp64, with `changes` to the section ``model``; every parameter is random."""
    shape = replace(tiny_run().model, num_layers=3, **changes)
    (model,) = build_model(shape, ParallelConfig(), torch.device("cpu"), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def loss_and_gradients(
    model: ESM2Model, ids: Tensor, packed: PackedSequences, labels: Tensor, places: Tensor
) -> dict[str, Tensor]:
    """The summed loss at some places of a pack, and the gradient of every parameter."""
    model.zero_grad()
    loss = cross_entropy(model(ids, packed, places), labels[places], reduction="sum")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}
