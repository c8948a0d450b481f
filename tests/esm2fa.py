"""Writes data sets in the published layout of ESM2-FA, by `datasets`, which wrote the published ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esm2mega import vocabulary

ARROW = "data-00000-of-00001.arrow"
"""The file of a small shard."""


def rows(proteins: Sequence[tuple[str, str]]) -> dict[str, list[Any]]:
    """Return the columns of a batch of (header, residues), with tokens padded to the longest of it."""
    tokens = [
        [vocabulary.CLS, *vocabulary.encode_residues(text).tolist(), vocabulary.EOS] for _, text in proteins
    ]
    width = max(map(len, tokens))
    return {
        "id": [header for header, _ in proteins],
        "input_ids": [ids + [vocabulary.PAD] * (width - len(ids)) for ids in tokens],
        "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids in tokens],
        "labels": [ids + [-100] * (width - len(ids)) for ids in tokens],
        "sequence_length": [len(text) for _, text in proteins],
        "batch_id": [0] * len(proteins),
    }


def shard(folder: Path, proteins: Sequence[tuple[str, str]] | Mapping[str, list[Any]]) -> Path:
    """Write a shard of proteins (header, residues), or of given columns; return its directory."""
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    columns = proteins if isinstance(proteins, Mapping) else rows(proteins)
    datasets.Dataset.from_dict(dict(columns)).save_to_disk(folder)
    return folder
