"""Defines `ESM2Model`: ESM-2, or the pipeline stage of it that this rank holds.

Legend: ``T`` tokens of a pack, ``m`` of them that get logits, ``h`` hidden size, ``t`` tensor-parallel size,
``c`` context-parallel size, ``v`` vocabulary (33), ``V`` vocabulary padded for the tensor-parallel split.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from esm2mega.model.context_parallel import (
    chosen_for_all,
    in_parts,
    own_part,
    rows_for_all,
)
from esm2mega.model.embedding import ESM2Embedding
from esm2mega.model.lm_head import LMHead
from esm2mega.model.packed import PackedSequences
from esm2mega.model.proteinbert import ProteinBertEmbedding
from esm2mega.model.rotary import RotaryTables
from esm2mega.parallel.context_collectives import gather_for_all
from esm2mega.vocabulary import VOCAB

VOCAB_SIZE = len(VOCAB)


def padded_vocab_size(tensor_model_parallel_size: int) -> int:
    """Return the rows of the token table: the least multiple of 8 (tensor cores) and of TP that holds 33.

    That is 40 for every TP size that divides the heads of a published ESM-2 (1, 2, 4, 5, 8, 10, 20, 40), so
    the table's shape does not depend on the layout.
    """
    multiple = math.lcm(8, tensor_model_parallel_size)
    return -(-VOCAB_SIZE // multiple) * multiple


class ESM2Model(LanguageModule):
    """Computes ESM-2, or the pipeline stage of it that this rank holds.

    It also computes the related models of `esm2mega.model.proteinbert`.

    The first stage (`pre_process`) embeds, the last (`post_process`) normalises and predicts. Checkpoint keys
    are those of Megatron-Core's BERT: ``embedding``, ``encoder``, ``lm_head``, ``output_layer``, and
    ``rotary``.

    Attributes:
        carried_rows: Largest `rows_to_carry` among the micro-batches of a step; set before each step.
        has_lm_head: Whether the last stage has the masked-language-model head.
    """

    carried_rows = 0
    has_lm_head = True

    def __init__(
        self,
        config: Any,
        submodules: TransformerBlockSubmodules,
        device: torch.device,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        """Build the modules with unset weights; `esm2mega.model.init` fills them.

        Args:
            config: `esm2mega.model.build.ESM2TransformerConfig`.
            submodules: Layers of this stage, from `esm2mega.model.layer_spec`.
            device: Where the weights live.
            pre_process: Whether this is the first stage.
            post_process: Whether this is the last stage.
            vp_stage: Number of this chunk under the interleaved schedule.
        """
        super().__init__(config=config)
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = True
        self.padded_vocab_size = padded_vocab_size(config.tensor_model_parallel_size)

        has_rotary = config.family == "esm2"
        self.rotary = RotaryTables(config, device, vp_stage) if has_rotary else None
        if pre_process and has_rotary:
            self.embedding = ESM2Embedding(
                config, self.padded_vocab_size, max_sequence_length=0, position_embedding_type="rope"
            )
        elif pre_process:
            self.embedding = ProteinBertEmbedding(config, self.padded_vocab_size, config.max_positions)
        self.encoder = TransformerBlock(
            config,
            submodules,
            post_layer_norm=config.final_layernorm,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        # The head sees tokens of all ranks at once, so within it nothing is split over the sequence.
        head_config = copy.copy(config)
        head_config.sequence_parallel = False
        self._build_head(head_config, device)
        self._tie_embeddings()

    def _build_head(self, config: Any, device: torch.device) -> None:
        """Build the modules that the last stage applies to hidden states.

        `config` is the configuration of the model without sequence parallelism.
        """
        if not self.post_process:
            return
        self.lm_head = LMHead(config, device)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            self.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            # V is 40: gathering [m, V/t] logits is cheaper than three all-reduces of a split cross-entropy.
            gather_output=True,
            skip_weight_param_allocation=self.pre_process,
        )

    def _tie_embeddings(self) -> None:
        """Use the token table as the decoder's weight; on another stage, a copy of it."""
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Take the hidden states that the previous pipeline stage sent (called by the schedule)."""
        self.encoder.set_input_tensor(input_tensor[0])

    def rows_to_carry(self, head_inputs: Any) -> int:
        """Return how many rows this rank sends to the next pipeline stage in addition to hidden states.

        Args:
            head_inputs: What a micro-batch holds for the head.
        """
        return 0

    def encode(self, input_ids: Tensor, packed: PackedSequences) -> Tensor:
        """Compute hidden states after this stage's layers (and the final LayerNorm on the last stage).

        Args:
            input_ids: int64 ``[T]``; read by the first stage only.
            packed: Borders of the sequences.

        Returns:
            ``[T/c, 1, h]``, or ``[T/(c t), 1, h]`` under sequence parallelism; ``[m, 1, h]`` from the last
            stage if `packed` has rows.
        """
        if self.config.context_parallel_size > 1 and packed.exchange is None:
            packed = in_parts(packed, self.config)
        if self.training and self.config.drops:
            packed = self._with_shares_of_keys(packed)
        return self.encoder(
            hidden_states=self.embedding(input_ids, packed) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=None if self.rotary is None else own_part(self.rotary(packed), self.config, dim=1),
            packed_seq_params=packed,
        )

    def _with_shares_of_keys(self, packed: PackedSequences) -> PackedSequences:
        """Return the pack with the keys of those tokens whose hidden states this rank holds."""
        if packed.hidden_keys is None:
            raise ValueError(
                "a model with dropout is in training mode, but its input has no keys for that: call eval(), "
                "or give it PackedSequences.with_dropout_keys"
            )
        if (size := self.config.context_parallel_size) > 1:
            packed = packed.with_share(size, parallel_state.get_context_parallel_rank())
        if not self.config.sequence_parallel:
            return packed
        return packed.with_share(self.tp_group.size(), self.tp_group.rank())

    def gathered(self, hidden_states: Tensor) -> Tensor:
        """Give all tokens to every rank's head: the layout of `encode` -> ``[T, 1, h]``."""
        hidden_states = self._part_gathered(hidden_states)
        return gather_for_all(hidden_states) if self.config.context_parallel_size > 1 else hidden_states

    def _part_gathered(self, hidden_states: Tensor) -> Tensor:
        """Gather a context-parallel part over tensor-parallel ranks: ``[T/(c t), 1, h] -> [T/c, 1, h]``."""
        if not self.config.sequence_parallel:
            return hidden_states
        # Every rank computes the same head on the gathered tokens, so the gradient is split, not reduced.
        return gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
        )

    def forward(
        self, input_ids: Tensor, packed: PackedSequences, logit_positions: Tensor | None = None
    ) -> Tensor:
        """Compute hidden states for the next stage, or logits on the last one.

        Args:
            input_ids: int64 ``[T]``; read by the first stage only.
            packed: Borders of the sequences.
            logit_positions: int64 ``[m]``, ascending, tokens that get logits; all of them when None. Training
                passes the masked ones: the head then costs 15 % of what it would, and so does most of the
                last layer if `packed` has row counts, there is no sequence parallelism (which scatters the
                tokens over ranks), the model is pre-LN, and under context parallelism `packed` has host rows.

        Returns:
            Hidden states in the layout of `encode`, or logits ``[m, v]``, the same on every tensor- and
            context-parallel rank. The padding of the vocabulary is cut off, so it gets no probability.
        """
        if self.post_process and logit_positions is not None and not self.config.last_layer_whole:
            packed = packed.with_rows(logit_positions)
        is_part = self.config.context_parallel_size > 1
        if is_part:
            packed = in_parts(packed, self.config)
        hidden_states = self.encode(input_ids, packed)
        if not self.post_process:
            return hidden_states
        if logit_positions is None:
            hidden_states = self.gathered(hidden_states)
        elif packed.rows is not None:
            hidden_states = rows_for_all(hidden_states, packed) if is_part else hidden_states
        elif is_part:
            hidden_states = chosen_for_all(self._part_gathered(hidden_states), logit_positions)
        else:
            hidden_states = self._part_gathered(hidden_states).index_select(0, logit_positions)
        shared = self.shared_embedding_or_output_weight() if self.pre_process else None
        logits, _ = self.output_layer(self.lm_head(hidden_states), weight=shared)
        # [m, 1, V] -> [m, v]
        return logits[:, 0, :VOCAB_SIZE]

    def global_parameter_name(self, name: str) -> str:
        """Return the name of a parameter in the whole model.

        Layers are counted from the first stage, and tied weights have one name.
        """
        if name == "output_layer.weight":
            return "embedding.word_embeddings.weight"
        prefix = "encoder.layers."
        if not name.startswith(prefix):
            return name
        number, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.encoder.layers[int(number)].layer_number - 1}.{rest}"


def shares_of_tokens(config: Any) -> int:
    """Return how many ranks share the hidden states of a pack, as far as between the layers: c, or c t."""
    return config.context_parallel_size * (
        config.tensor_model_parallel_size if config.sequence_parallel else 1
    )


def stage_flags(vp_stage: int | None = None) -> tuple[bool, bool]:
    """Return `pre_process` and `post_process` of this rank's chunk `vp_stage`."""
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
    )
