"""Defines the masked-language-model head up to its decoder: dense, GELU, LayerNorm.

Legend: ``m`` tokens that get logits, ``h`` hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from esm2mega.model.layernorm import LayerNorm


class LMHead(MegatronModule):
    """Transforms hidden states for the decoder; all tensor-parallel ranks have equal weights and tokens."""

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        """Build the modules.

        Args:
            config: Configuration without sequence parallelism, since the tokens arrive gathered.
            device: Where the weights live.
        """
        super().__init__(config=config)
        h = config.hidden_size
        self.dense = torch.nn.Linear(h, h, device=device, dtype=config.params_dtype)
        self.layer_norm = LayerNorm(config, h, config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply dense, exact-erf GELU and LayerNorm: ``[m, 1, h] -> [m, 1, h]``."""
        return self.layer_norm(torch.nn.functional.gelu(self.dense(hidden_states)))
