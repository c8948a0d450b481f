"""Defines the parts of TAPE's and ProteinLM's protein BERTs that differ from ESM-2.

Both add learned positions to the tokens and have neither rotary positions nor token dropout. ProteinLM
(`proteinbert_preln`) normalises before each block, as ESM-2. TAPE (`proteinbert_postln`) normalises after it.

Post-LN weights have the names of pre-LN: each LayerNorm of TAPE belongs to the block that follows it, and the
last one is the final LayerNorm. Then a block's residual is the output of its LayerNorm, not the input.

Legend: ``T`` tokens of a pack, ``t`` tensor-parallel size, ``h`` hidden size, ``p`` positions.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from esm2mega.model.context_parallel import own_part
from esm2mega.model.dropout import ATTENTION_OUTPUT, EMBEDDING, MLP_OUTPUT, place_of
from esm2mega.model.layer import dropped
from esm2mega.model.linear import with_bias
from esm2mega.model.packed import PackedSequences
from esm2mega.vocabulary import PAD


class ProteinBertEmbedding(LanguageModelEmbedding):
    """Embeds tokens with learned positions, which count from 0 in each sequence of a pack."""

    def __init__(self, config: Any, vocab_size: int, max_positions: int) -> None:
        """Build the tables.

        Args:
            config: Configuration of the model.
            vocab_size: Rows of the token table.
            max_positions: ``p``.
        """
        super().__init__(config, vocab_size, max_positions, position_embedding_type="learned_absolute")
        # The parent class makes this table in fp32, whatever the dtype of the model.
        self.position_embeddings.to(config.params_dtype)

    def forward(self, input_ids: Tensor, packed: PackedSequences) -> Tensor:
        """Embed a pack.

        Args:
            input_ids: int64 ``[T]``.
            packed: Borders of the sequences, each of at most ``p`` tokens.

        Returns:
            ``[T, 1, h]``, or this rank's part of it under sequence or context parallelism.
        """
        # The pad tail of a pack may be longer than the table; nothing reads its output.
        positions = packed.positions().masked_fill(input_ids == PAD, 0)
        own = [own_part(values, self.config).unsqueeze(0) for values in (input_ids, positions)]
        embeddings = super().forward(*own)
        # TAPE drops behind the LayerNorm of the embedding, which here belongs to the first layer.
        if self.training and self.config.keyed_hidden_dropout and self.config.family == "proteinbert_preln":
            return dropped(embeddings, self.config, packed, place_of(0, EMBEDDING))
        return embeddings


class PostLayerNormLayer(TransformerLayer):
    """Computes a layer whose residuals are the outputs of its LayerNorms.

    It is ``y = LN(x)``, ``z = LN(y + attention(y))``, ``z + mlp(z)``. Megatron-Core has a switch for this,
    `apply_residual_connection_post_layernorm`, which no layer reads.
    """

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: PackedSequences,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Compute the layer: ``[T, 1, h] -> [T, 1, h]``, or ``[T/t, 1, h]`` under sequence parallelism."""
        drops = self.training and self.config.keyed_hidden_dropout > 0
        normed = self.input_layernorm(hidden_states)
        if drops and self.layer_number == 1:
            normed = dropped(normed, self.config, packed_seq_params, place_of(0, EMBEDDING))
        attended = self.self_attention(
            normed, None, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        output = with_bias(*attended)
        if drops:
            place = place_of(self.layer_number, ATTENTION_OUTPUT)
            output = dropped(output, self.config, packed_seq_params, place)
        normed = self.pre_mlp_layernorm(normed + output)
        output = with_bias(*self.mlp(normed))
        if drops:
            output = dropped(output, self.config, packed_seq_params, place_of(self.layer_number, MLP_OUTPUT))
        output = normed + output
        # A view would hold the whole graph of the layer in memory when the pipeline sends it on.
        output = make_viewless_tensor(inp=output, requires_grad=output.requires_grad, keep_graph=True)
        return output, None
