"""Defines a LayerNorm that works under sequence parallelism without Transformer Engine or apex."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LayerNorm(torch.nn.LayerNorm):
    """Gives `torch.nn.LayerNorm` the constructor that Megatron-Core's specs call.

    Statistics are taken in fp32 for bf16 input by the kernel itself. Under sequence parallelism each rank
    normalises its share of the tokens, so the gradients of weight and bias are partial sums; the mark
    ``sequence_parallel`` makes Megatron-Core all-reduce them over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any) -> None:
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
