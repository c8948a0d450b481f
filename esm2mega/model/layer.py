"""Defines a transformer layer that, as the last one, computes only the tokens that get logits.

It also has keyed dropout, where Megatron-Core's layer would take random numbers from a generator.

Legend: ``T`` tokens of a pack, ``m`` of them that get logits, ``h`` hidden size, ``t`` tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from esm2mega.model.dropout import ATTENTION_OUTPUT, MLP_OUTPUT, drop, place_of
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
        rows = packed_seq_params.rows if self.layer_number == self.config.num_layers else None
        drops = self.training and self.config.keyed_hidden_dropout > 0
        if rows is None and not drops:
            return super().forward(hidden_states, packed_seq_params=packed_seq_params, **others)
        attended = self.self_attention(
            self.input_layernorm(hidden_states),
            rotary_pos_emb=others["rotary_pos_emb"],
            packed_seq_params=packed_seq_params,
            rows=rows,
        )
        residual = hidden_states if rows is None else hidden_states.index_select(0, rows)
        if drops:
            output, bias = attended
            place = place_of(self.layer_number, ATTENTION_OUTPUT)
            hidden_states = residual + dropped(output + bias, self.config, packed_seq_params, place, rows)
            output, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
            place = place_of(self.layer_number, MLP_OUTPUT)
            return hidden_states + dropped(output + bias, self.config, packed_seq_params, place, rows), None
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add(attended, residual, self.hidden_dropout)
        return self._forward_mlp(hidden_states), None


def dropped(
    output: Tensor, config: Any, packed: PackedSequences, place: int, rows: Tensor | None = None
) -> Tensor:
    """Drop hidden states by the keys of their tokens.

    Args:
        output: ``[T, 1, h]``, ``[T/t, 1, h]`` under sequence parallelism, or ``[m, 1, h]`` at `rows`.
        config: Configuration of the model.
        packed: Keys of the tokens.
        place: Number from `esm2mega.model.dropout.place_of`.
        rows: int64 ``[m]``, the tokens that `output` is of; all of them when None.
    """
    keys = packed.hidden_keys
    assert keys is not None  # `ESM2Model.encode` has checked it
    keys = keys if rows is None else keys.index_select(0, rows)
    return drop(output, config.keyed_hidden_dropout, keys[:, None], place)
