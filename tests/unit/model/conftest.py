"""A small model in a world of one process."""

from __future__ import annotations

import pytest
import torch

from esm2mega.config.schema import ParallelConfig
from esm2mega.model.build import build_model
from esm2mega.model.esm2 import ESM2Model
from tests.unit.runs import tiny_run


@pytest.fixture
def model(world: None) -> ESM2Model:
    """Two layers in fp64; all dimensions differ."""
    (model,) = build_model(tiny_run().model, ParallelConfig(), torch.device("cpu"), seed=5)
    return model
