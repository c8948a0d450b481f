"""Makes the proteins that an exported program is compared on, and puts them in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from esm2mega.vocabulary import CLS, EOS, MASK, PAD, SPECIAL_TOKENS, STANDARD_RESIDUES, VOCAB

_LENGTHS = (1, 2, 5, 12, 19, 28, 37, 46, 55, 64, 73, 82, 96, 110, 128, 150, 180, 257, 300, 384)
"""Residues of the proteins; beyond 256, errors of positions show."""

_BATCH_SIZES = (1, 3, 4, 5, 7)
_SEED = 20


def proteins() -> list[Tensor]:
    """Return token ids of 20 random proteins, int64 ``[s]`` each, long and short ones in turn.

    One holds every letter, and every second one has a share of its residues masked.
    """
    rng = np.random.default_rng(_SEED)
    rare = [token for token in range(len(VOCAB)) if token not in (*SPECIAL_TOKENS, *STANDARD_RESIDUES)]
    result = []
    for number, length in enumerate(_LENGTHS):
        residues = rng.integers(STANDARD_RESIDUES.start, STANDARD_RESIDUES.stop, length)
        if number == len(_LENGTHS) - 2:  # which stays as it is
            residues[: len(rare)] = rare
        if number % 2:
            residues[rng.random(length) < 0.3 * rng.random()] = MASK
        result.append(torch.tensor([CLS, *residues.tolist(), EOS]))
    # 7 and 20 have no common divisor, so every protein is taken once.
    return [result[7 * number % len(result)] for number in range(len(result))]


def batches(ids: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield which proteins a batch holds, their padded token ids and the mask, int64 ``[b, s]`` both."""
    first = 0
    for size in _BATCH_SIZES:
        some = slice(first, first + size)
        padded = torch.nn.utils.rnn.pad_sequence(list(ids[some]), batch_first=True, padding_value=PAD)
        yield some, padded, (padded != PAD).long()
        first += size
