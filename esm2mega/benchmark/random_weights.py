"""Draws random ESM-2 weights of any size, tensor by tensor as a format writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.presets import PRESETS
from esm2mega.convert.lazy_weights import Description, Weights
from esm2mega.convert.name_table import FREQUENCIES, our_shapes
from esm2mega.model.rotary import rotary_frequencies

STANDARD_DEVIATION = 0.02
"""Keeps activations in the range of a trained model, so that no program meets numbers that slow it down."""


def random_weights(size: str) -> Weights:
    """Return fp32 weights of a preset with the language-model head."""
    shape = PRESETS[size]
    infos = {name: TensorInfo(dimensions, torch.float32) for name, dimensions in our_shapes(shape).items()}
    generator = torch.Generator().manual_seed(1)

    def read(name: str) -> Tensor:
        if name == FREQUENCIES:
            return rotary_frequencies(shape.hidden_size // shape.num_attention_heads, torch.float32)
        return STANDARD_DEVIATION * torch.randn(infos[name].shape, generator=generator)

    return Weights(Description(shape, 1e-5), infos, read)
