"""Fixes how proteins are masked for evaluation, and names each recipe of an evaluation by a hash.

The masks of a protein are a function of `eval.seed` and its residues alone: its number, the store, the packs,
the processes and the masks of training do not matter, and equal proteins have equal masks. What is longer
than `data.max_seq_length` is cut into chunks, all of which are evaluated; they are masked as the whole
protein would be. Losses of the same proteins can be compared if their recipes have the same hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from esm2mega.config.schema import DataConfig, EvalConfig
from esm2mega.data.counter_rng import Integers
from esm2mega.data.stream.samples import Pieces, Proteins

_VERSION = 1
"""Is raised by every change that masks a protein otherwise."""

_RANDOM_RESIDUES = "amino_acids"


def masked_as(data: DataConfig, masks: EvalConfig) -> DataConfig:
    """Return the section `data` with the recipe of evaluation in place of the masks and crops of training."""
    return replace(
        data,
        crop="chunk",
        mlm_probability=masks.mlm_probability,
        mask_fraction=masks.mask_fraction,
        random_fraction=masks.random_fraction,
        random_residues=_RANDOM_RESIDUES,
    )


def protein_streams(stores: Sequence[Proteins], pieces: Pieces) -> Integers:
    """Return which random stream masks the protein of each piece: a hash of its residues, [n].

    The token ids of the whole protein are hashed, one byte each, to 64 bits that are equal on every machine.
    """
    hashes = [
        hashlib.blake2b(stores[store].residues(row).tobytes(), digest_size=8).digest()
        for store, row in zip(pieces.stores.tolist(), pieces.rows.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64)


def masks_recipe(masks: EvalConfig, max_seq_length: int) -> str:
    """Return the hash of all that decides the masks and the pieces of a protein in evaluation."""
    return recipe_hash("masks", _VERSION, masks_settings(masks, max_seq_length))


def masks_settings(masks: EvalConfig, max_seq_length: int) -> dict[str, Any]:
    """Return what `masks_recipe` hashes, by name."""
    return {**asdict(masks), "max_seq_length": max_seq_length, "random_residues": _RANDOM_RESIDUES}


def proteins_hash(fingerprint: str, limit: int) -> str:
    """Return the hash of what is evaluated in a run, which makes packs of one kind from its start to its end.

    Args:
        fingerprint: Hash of the split.
        limit: Largest number of packs over all ranks; 0 for the whole split.
    """
    return recipe_hash("proteins", _VERSION, {"split": fingerprint, "limit": limit})


def recipe_hash(what: str, version: int, settings: Mapping[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of a recipe in canonical form.

    Args:
        what: What is predicted.
        version: Version of the code that carries the recipe out.
        settings: Numbers, texts and nulls by name.
    """
    text = json.dumps({"what": what, "version": version, **settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe_masks(masks: EvalConfig, max_seq_length: int) -> str:
    """Describe the recipe for a reader who sees its hash."""
    kept = 1 - masks.mask_fraction - masks.random_fraction
    return (
        f"{masks.mlm_probability:.4g} of the residues, of these {masks.mask_fraction:.4g} <mask>, "
        f"{masks.random_fraction:.4g} random, {max(kept, 0):.4g} kept; eval.seed={masks.seed}, chunks of at "
        f"most {max_seq_length} tokens"
    )
