"""Defines a transformer layer that, as the last one, computes only the tokens that get logits.

It also has keyed dropout, where Megatron-Core's layer would take random numbers from a generator.

Legend: ``T`` tokens of a pack, ``m`` of them that get logits, ``h`` hidden size, ``t`` tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from esm2mega.model.compiled import after_attention, before_attention, is_plain
from esm2mega.model.dropout import ATTENTION_OUTPUT, MLP_OUTPUT, drop, place_of
from esm2mega.model.linear import with_bias
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
        if self.config.compiled_layers and not drops and is_plain(self):
            return self._compiled(hidden_states, packed_seq_params, others["rotary_pos_emb"], rows), None
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
            place = place_of(self.layer_number, ATTENTION_OUTPUT)
            output = dropped(with_bias(*attended), self.config, packed_seq_params, place, rows)
            hidden_states = residual + output
            place = place_of(self.layer_number, MLP_OUTPUT)
            output = with_bias(*self.mlp(self.pre_mlp_layernorm(hidden_states)))
            return hidden_states + dropped(output, self.config, packed_seq_params, place, rows), None
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add(attended, residual, self.hidden_dropout)
        return self._forward_mlp(hidden_states), None

    def _compiled(
        self, hidden_states: Tensor, packed: PackedSequences, tables: Tensor, rows: Tensor | None
    ) -> Tensor:
        query, key, value = before_attention(self, hidden_states, tables)
        context = self.self_attention.attend(query, key, value, packed, rows)
        residual = hidden_states if rows is None else hidden_states.index_select(0, rows)
        output = after_attention(self, residual, context)
        # A view would hold the whole graph of the layer in memory when the pipeline sends it on.
        return make_viewless_tensor(inp=output, requires_grad=output.requires_grad, keep_graph=True)


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
