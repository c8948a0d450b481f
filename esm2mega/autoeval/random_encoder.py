"""Writes a model of the same shape as another whose weights are as before the first step of pretraining."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.formats import esm2mega as own_format
from esm2mega.convert.lazy_weights import Weights
from esm2mega.convert.name_table import FREQUENCIES
from esm2mega.convert.start_point import read_start
from esm2mega.files import appearing
from esm2mega.lora.base import MERGE_THEM, check_base, has_adapters, identify, with_base
from esm2mega.model.init import initial_value
from esm2mega.model.rotary import rotary_frequencies


def write_random_encoder(like: str | Path, out: Path, seed: int) -> Path:
    """Write a checkpoint with the weights of a pretraining run at step 0, in this process alone.

    What probes reach with its embeddings owes nothing to training.

    Args:
        like: Checkpoint in any format that has the shape.
        out: Directory to make.
        seed: Seed of the weights.
    """
    start = read_start(like)
    if has_adapters(start):  # they have the shape of what they are trained on
        base = with_base(start, None, cure=MERGE_THEM).base
        assert base is not None
        check_base(start, identify(base))
        start = base
    description = replace(start.weights.description, head="lm", dtype=torch.float32)

    def read(name: str) -> Tensor:
        if name == FREQUENCIES:
            return rotary_frequencies(description.head_dim, torch.float32)
        return initial_value(name, torch.empty(description.shapes[name]), seed, start.run.model.init_std)

    beside = own_format.is_auxiliary(description)
    infos = {
        name: TensorInfo(shape, torch.float32)
        for name, shape in description.shapes.items()
        if not beside(name)
    }
    origin = {"format": "random weights", "path": str(start.path)}
    with appearing(out) as folder:
        own_format.write(Weights(description, infos, read, origin=origin), folder)
    return out
