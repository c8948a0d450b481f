"""Reads tables that were tokenised before: columns of token ids and attention masks in place of sequences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.data.labels.lists import is_list, list_of
from esm2mega.errors import UserError

INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
"""These are columns of such a table, as ``data.sequence_column=input_ids`` says."""


def tokens_of_ids(cells: Mapping[str, object], location: str) -> npt.NDArray[np.uint8]:
    """Return the residues of a row of ``input_ids``, without `<cls>`, `<eos>` and padding.

    The row's ``attention_mask`` decides what is padding, whatever its id.
    """
    ids = _integers(cells[INPUT_IDS], INPUT_IDS, location)
    mask = np.ones_like(ids)
    if ATTENTION_MASK in cells:
        mask = _integers(cells[ATTENTION_MASK], ATTENTION_MASK, location)
    if len(mask) != len(ids):
        raise UserError(f"{location}: {len(mask)} numbers in {ATTENTION_MASK} for {len(ids)} in {INPUT_IDS}")
    ids = ids[mask != 0]
    if len(ids) < 3 or ids[0] != vocabulary.CLS or ids[-1] != vocabulary.EOS:
        raise UserError(
            f"{location}: {INPUT_IDS} must be <cls> ({vocabulary.CLS}), residues, <eos> ({vocabulary.EOS}) "
            f"under {ATTENTION_MASK}; tokenise again with the ESM-2 vocabulary and without truncation"
        )
    if ids.min() < 0 or ids.max() >= len(vocabulary.VOCAB):
        raise UserError(f"{location}: {INPUT_IDS} must be 0 to {len(vocabulary.VOCAB) - 1}")
    return ids[1:-1].astype(np.uint8)


def _integers(value: object, column: str, location: str) -> npt.NDArray[np.int64]:
    """Return the whole numbers of a cell, which is a list or its text."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = list_of(text if is_list(text) else f"[{text}]")
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise UserError(f"{location}: column {column!r} must hold a list of whole numbers")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        raise UserError(f"{location}: column {column!r} holds a number beyond 64 bits") from None
