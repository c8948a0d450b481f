"""The Hugging Face model of a size of ESM-2 that the benchmarks run beside ours."""

from __future__ import annotations

from typing import Any

from esm2mega import vocabulary
from esm2mega.config.presets import PRESETS


def config_of(size: str) -> Any:
    """`EsmConfig` of a published size."""
    from transformers import EsmConfig

    shape = PRESETS[size]
    return EsmConfig(
        vocab_size=len(vocabulary.VOCAB),
        mask_token_id=vocabulary.MASK,
        pad_token_id=vocabulary.PAD,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.ffn_hidden_size,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
        # As in the published checkpoints; the class default is 0.1.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
