"""Initial weights: a pure function of (seed, parameter name), the same for every parallel layout."""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state
from torch import Tensor

from esm2mega.data.tokenizer import PAD
from esm2mega.model.esm2 import VOCAB_SIZE, ESM2Model


@torch.no_grad()
def initialize_parameters(model: ESM2Model, seed: int, std: float) -> None:
    """Fill all parameters as ESM-2 starts: normal(0, std) matrices, zero biases, LayerNorms 1 and 0.

    Each full matrix is drawn in fp32 on the CPU from a generator of its own, keyed by the seed and the
    parameter's name in the whole model, and this rank keeps its slice. The row of ``<pad>`` and the padding
    of the vocabulary are zero.

    Args:
        model: A stage or chunk of the model.
        seed: The run's seed.
        std: Standard deviation of every matrix (0.02 in ESM-2; no scaling of output projections).
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(_initial_value(model.global_parameter_name(name), parameter, seed, std))


def _initial_value(name: str, parameter: Tensor, seed: int, std: float) -> Tensor:
    if parameter.dim() == 1:
        is_scale = name.endswith(("norm.weight", "layer_norm_weight"))
        return torch.full_like(parameter, 1.0 if is_scale else 0.0)
    partition_dim = (
        getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    )
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    shape = list(parameter.shape)
    if partition_dim >= 0:
        shape[partition_dim] *= tp_size
    if name == "embedding.word_embeddings.weight":
        full = torch.zeros(shape)
        full[:VOCAB_SIZE] = _normal([VOCAB_SIZE, shape[1]], name, seed) * std
        full[PAD] = 0.0
    else:
        full = _normal(shape, name, seed) * std
    if partition_dim >= 0:
        full = full.chunk(tp_size, dim=partition_dim)[parallel_state.get_tensor_model_parallel_rank()]
    return full.to(parameter)


def _normal(shape: list[int], name: str, seed: int) -> Tensor:
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
