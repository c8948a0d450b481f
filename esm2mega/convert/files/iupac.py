"""The vocabularies of TAPE and ProteinLM, whose tokens are among the 33 of ESM-2 in another order.

Models are kept in the order of ESM-2, so that one tokenizer and one token store serve all of them. Rows of
the three tokens that only ESM-2 has (``.``, ``-``, ``<null_1>``) are zero, and their bias is so low that they
take no probability.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from esm2mega.config.presets import ModelShape
from esm2mega.convert.name_table import Kind
from esm2mega.vocabulary import VOCAB

# TAPE 0.5, tape/tokenizers.py; <sep> ends a sequence as <eos> does.
TAPE_TOKENS = ("<pad>", "<mask>", "<cls>", "<eos>", "<unk>", *"ABCDEFGHIKLMNOPQRSTUVWXYZ")
# ProteinLM's vocabulary file: the same with an unused token after the special ones.
PROTEINLM_TOKENS = (*TAPE_TOKENS[:5], None, *TAPE_TOKENS[5:])

ESM_ONLY = tuple(token for token in VOCAB if token not in TAPE_TOKENS)
"""Tokens without a row in these vocabularies."""

_LOWEST_BIAS = -1e4
"""What BERT adds to what shall not be attended to: exp of it is 0, and it exists in every dtype."""


def esm_ids(tokens: Sequence[str | None]) -> list[int]:
    """The ids of ESM-2 of the rows that are in use, in the order of those rows."""
    return [VOCAB.index(token) for token in tokens if token is not None]


def vocabulary_kind(tokens: Sequence[str | None], padded: bool) -> Kind:
    """A table or bias with one row for each of `tokens`, and perhaps padding behind them.

    Args:
        tokens: In the order of the rows; None for a row that stands for nothing.
        padded: Whether more rows may follow.
    """
    rows = [row for row, token in enumerate(tokens) if token is not None]
    ids = esm_ids(tokens)

    def to_ours(parts: Sequence[Tensor], _: ModelShape) -> Tensor:
        value = parts[0]
        is_bias = value.dim() == 1
        ours = value.new_full((len(VOCAB), *value.shape[1:]), _LOWEST_BIAS if is_bias else 0.0)
        ours[ids] = value[rows]
        return ours

    def to_theirs(value: Tensor, _: ModelShape, __: int) -> Sequence[Tensor]:
        theirs = value.new_zeros(len(tokens), *value.shape[1:])
        theirs[rows] = value[ids]
        return [theirs]

    return Kind(
        to_ours,
        to_theirs,
        part_shape=lambda shape: (len(tokens), *shape[1:]),
        least_rows=len(tokens) if padded else None,
    )


TAPE_VOCABULARY = vocabulary_kind(TAPE_TOKENS, padded=False)
PROTEINLM_VOCABULARY = vocabulary_kind(PROTEINLM_TOKENS, padded=True)

LOST_TOKENS = f"the rows of {' '.join(ESM_ONLY)}: TAPE's vocabulary has no such tokens"
