"""Converts the vocabularies of TAPE and ProteinLM, which have most tokens of ESM-2 in another order.

Models are kept in the order of ESM-2, so that one tokenizer and one token store serve all of them. The rows
of the three tokens that only ESM-2 has (``.``, ``-``, ``<null_1>``) are zero, and their bias is so low that
their probability is zero.
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
"""These tokens have no row in the two vocabularies."""

_LOWEST_BIAS = -1e4
"""BERT adds this number to masked positions: its exponential is 0, and it is finite in every dtype."""


def esm_ids(tokens: Sequence[str | None]) -> list[int]:
    """Return the ids of ESM-2 for the rows in use, in the order of those rows."""
    return [VOCAB.index(token) for token in tokens if token is not None]


def vocabulary_kind(tokens: Sequence[str | None], padded: bool) -> Kind:
    """Return the kind of a table or bias with one row for each of `tokens`, and padding if `padded`.

    Args:
        tokens: Tokens in the order of the rows; None for an unused row.
        padded: Whether rows of padding may follow.
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
