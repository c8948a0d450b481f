"""Draws initial weights as a pure function of seed and parameter name, the same for every layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from torch import Tensor

from esm2mega.model.esm2 import VOCAB_SIZE, ESM2Model
from esm2mega.vocabulary import PAD


@torch.no_grad()
def initialize_parameters(model: ESM2Model, seed: int, std: float) -> None:
    """Fill all parameters as ESM-2 starts: normal(0, std) matrices, zero biases, LayerNorms 1 and 0.

    Each full matrix is drawn in fp32 on the CPU from a generator of its own, keyed by the seed and the
    parameter's name in the whole model, and this rank keeps its slice. The row of ``<pad>`` and the padding
    of the vocabulary are zero. Matrices of a task's head are normal(0, 1 / sqrt(inputs)) instead. A parameter
    with an attribute `starts_at` is filled with that number.

    Args:
        model: A stage or chunk of the model.
        seed: The run's seed.
        std: Standard deviation of every matrix (0.02 in ESM-2; no scaling of output projections).
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model.global_parameter_name(name), parameter, seed, std))


def initial_value(name: str, parameter: Tensor, seed: int, std: float) -> Tensor:
    """Return the first value of a parameter: this rank's slice, or the whole where nothing is split.

    Args:
        name: Name of the parameter in the whole model.
        parameter: Tensor with its shape and dtype.
        seed: The run's seed.
        std: Standard deviation of matrices.
    """
    if (start := getattr(parameter, "starts_at", None)) is not None:
        return torch.full_like(parameter, start)
    if parameter.dim() == 1:
        is_scale = name.endswith(("norm.weight", "layer_norm_weight"))
        return torch.full_like(parameter, 1.0 if is_scale else 0.0)

    def normal(shape: list[int], generator: torch.Generator) -> Tensor:
        if name.startswith("head."):
            # The head of a task: outputs are as large as inputs, whatever the width.
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
            return drawn / math.sqrt(math.prod(shape[1:]))
        if name != "embedding.word_embeddings.weight":
            return torch.randn(shape, generator=generator, dtype=torch.float32) * std
        table = torch.zeros(shape)
        table[:VOCAB_SIZE] = torch.randn([VOCAB_SIZE, shape[1]], generator=generator) * std
        table[PAD] = 0.0
        return table

    return draw(name, parameter, seed, normal)


def draw(
    name: str, parameter: Tensor, seed: int, sample: Callable[[list[int], torch.Generator], Tensor]
) -> Tensor:
    """Return this rank's slice of a random matrix that is a function of seed and name.

    Args:
        name: Name of the parameter in the whole model.
        parameter: Tensor with the shape, dtype and tensor-parallel split of the slice.
        seed: The run's seed.
        sample: Makes the whole matrix from its shape and a generator on the CPU.
    """
    split = getattr(parameter, "tensor_model_parallel", False)
    dimension = getattr(parameter, "partition_dim", -1) if split else -1
    shape = list(parameter.shape)
    if dimension >= 0:
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        shape[dimension] *= tp_size
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    full = sample(shape, torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1))
    if dimension >= 0:
        full = full.chunk(tp_size, dim=dimension)[parallel_state.get_tensor_model_parallel_rank()]
    return full.to(parameter)
