"""Defines a transformer layer that, as the last one, computes only the tokens that get logits.

Legend: ``T`` tokens of a pack, ``m`` of them that get logits, ``h`` hidden size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from esm2mega.model.packed import PackedSequences


class ESM2Layer(TransformerLayer):
    """Computes Megatron-Core's transformer layer; as the last layer, only the tokens that get logits.

    The last layer needs keys and values of all tokens, and everything else only at `PackedSequences.rows`.
    """

    def forward(
        self, hidden_states: Tensor, *, packed_seq_params: PackedSequences, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the hidden states after this layer.

        Args:
            hidden_states: ``[T, 1, h]``, or ``[T/t, 1, h]`` under sequence parallelism.
            packed_seq_params: Borders of the sequences, and the rows that get logits.
            **others: Further arguments of the parent class and of the attention.

        Returns:
            ``[m, 1, h]`` from the last layer if there are rows, else the layout of `hidden_states`; and the
            parent's context, which is None for an encoder.
        """
        rows = packed_seq_params.rows
        if rows is None or self.layer_number < self.config.num_layers:
            return super().forward(hidden_states, packed_seq_params=packed_seq_params, **others)
        attended = self.self_attention(
            self.input_layernorm(hidden_states),
            rotary_pos_emb=others["rotary_pos_emb"],
            packed_seq_params=packed_seq_params,
            rows=rows,
        )
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add(attended, hidden_states.index_select(0, rows), self.hidden_dropout)
        return self._forward_mlp(hidden_states), None
