"""Packs of labelled proteins for tests of heads and losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.batch import LabelledBatch
from esm2mega.config.schema import DataConfig
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.stream import LabelledPacks
from esm2mega.data.stream.build import BatchSpec
from esm2mega.vocabulary import encode_residues


def proteins_of(
    sequences: Sequence[str], labels: Any = None, per_residue: bool = False, per_pair: bool = False
) -> LabelledProteins:
    """Proteins in memory, named by their numbers."""
    tokens = [encode_residues(sequence) for sequence in sequences]
    return LabelledProteins(
        Path("test"),
        [str(number) for number in range(len(tokens))],
        np.concatenate(tokens),
        np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        labels,
        per_residue,
        per_pair,
    )


def one_pack(proteins: LabelledProteins, num_tokens: int = 256) -> LabelledBatch:
    """All proteins in one pack; its rows say in which order."""
    spec = BatchSpec(DataConfig(max_seq_length=128), num_tokens, seed=3)
    (batch,) = LabelledPacks(proteins, spec)
    assert batch.num_sequences == len(proteins)
    return batch
