"""Embeds tokens as ESM-2 does: a table split over the vocabulary, and token dropout for each sequence.

Legend: ``T`` tokens of a pack, ``n`` sequences, ``t`` tensor-parallel size, ``h`` hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor

from esm2mega.model.context_parallel import own_part
from esm2mega.model.packed import PackedSequences
from esm2mega.vocabulary import MASK

# ESM-2 was trained with 15 % of the residues selected and 80 % of those replaced by <mask>. Each sequence is
# rescaled as if it had that share of zeroed rows, also when it has none, as at inference (Lin et al. 2023;
# fair-esm model/esm2.py).
TRAINED_MASK_RATIO = 0.15 * 0.8


def token_dropout_scale(input_ids: Tensor, packed: PackedSequences) -> Tensor:
    """Return each token's factor: 0 at ``<mask>``, else ``(1 - 0.12) / (1 - masked/length)`` of its sequence.

    Args:
        input_ids: int64 ``[T]``.
        packed: Borders of the sequences; lengths count ``<cls>`` and ``<eos>``.

    Returns:
        fp64 ``[T]``: the quotient does not lose precision to the model's dtype; the caller casts.
    """
    masked = input_ids == MASK
    sequence_ids = packed.sequence_ids()
    lengths = packed.cu_seqlens_q.diff().double()
    counts = torch.zeros_like(lengths).index_add_(0, sequence_ids, masked.double())
    # A sequence of nothing but <mask> gives infinity, but has no row to scale: its factors are all set to 0.
    scale = (1.0 - TRAINED_MASK_RATIO) / (1.0 - counts / lengths)
    return scale[sequence_ids].masked_fill(masked, 0.0)


class ESM2Embedding(LanguageModelEmbedding):
    """Applies token dropout to Megatron-Core's language-model embedding, which here has no positions."""

    def forward(self, input_ids: Tensor, packed: PackedSequences) -> Tensor:
        """Embed a pack.

        Args:
            input_ids: int64 ``[T]``.
            packed: Borders of the sequences.

        Returns:
            ``[T, 1, h]``, or this rank's part of it under sequence or context parallelism.
        """
        embeddings = super().forward(own_part(input_ids, self.config).unsqueeze(0), position_ids=None)
        scale = own_part(token_dropout_scale(input_ids, packed), self.config).to(embeddings.dtype)
        if self.config.sequence_parallel:
            scale = scale.chunk(self.tp_group.size())[self.tp_group.rank()]
        return embeddings * scale[:, None, None]
