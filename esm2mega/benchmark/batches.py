"""Divides masked proteins among batches, padded or packed, the same for every contender.

Legend: ``b`` proteins of a batch, ``s`` tokens of its longest, ``L`` residues of a protein.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from esm2mega import vocabulary
from esm2mega.batch import PackedBatch
from esm2mega.benchmark.proteins import Protein, random_residues
from esm2mega.config.schema import DataConfig
from esm2mega.data.stream.masking import MaskedTokens, mask_tokens

IGNORED_LABEL = -100

Batches = list[list[MaskedTokens]]
"""Holds proteins as masked tokens, `<cls>` and `<eos>` included, batch by batch."""

Batching = Callable[[Sequence[MaskedTokens]], Batches]
"""Divides proteins, in their order, among batches."""


def random_proteins(lengths: Sequence[int], seed: int) -> list[MaskedTokens]:
    """Mask proteins of `random_residues`."""
    proteins = random_residues(lengths, seed)
    return [mask_protein(residues, number, seed) for number, residues in enumerate(proteins)]


def mask_protein(residues: Protein, number: int, seed: int) -> MaskedTokens:
    """Put `<cls>` and `<eos>` around token ids of residues, and mask them as training does.

    Args:
        residues: Token ids, ``[L]``.
        number: Of the protein: masks are a function of it and the seed.
        seed: Of the masks.
    """
    tokens = np.concatenate([[vocabulary.CLS], residues, [vocabulary.EOS]]).astype(np.uint8)
    return mask_tokens(tokens, np.array([number]), np.array([len(tokens)]), seed, DataConfig())


def by_tokens(budget: int) -> Batching:
    """Return the batching that begins a new batch where the next protein would exceed `budget` tokens."""

    def batched(proteins: Sequence[MaskedTokens]) -> Batches:
        batches: Batches = []
        room = 0
        for protein in proteins:
            if len(protein.input_ids) > room:
                batches.append([])
                room = budget
            batches[-1].append(protein)
            room -= len(protein.input_ids)
        return batches

    return batched


def by_padded_tokens(budget: int) -> Batching:
    """Return the batching that begins a new batch where padding would make it exceed `budget` tokens."""

    def batched(proteins: Sequence[MaskedTokens]) -> Batches:
        batches: Batches = []
        width = 0
        for protein in proteins:
            width = max(width, len(protein.input_ids))
            if not batches or width * (len(batches[-1]) + 1) > budget:
                batches.append([])
                width = len(protein.input_ids)
            batches[-1].append(protein)
        return batches

    return batched


def random_order(proteins: Sequence[MaskedTokens], batching: Batching, rng: np.random.Generator) -> Batches:
    """Return batches of the proteins in a new random order."""
    return batching([proteins[i] for i in rng.permutation(len(proteins))])


def sorted_order(proteins: Sequence[MaskedTokens], batching: Batching, rng: np.random.Generator) -> Batches:
    """Return batches of proteins of similar length, the batches in a new random order."""
    batches = batching(sorted(proteins, key=lambda protein: len(protein.input_ids)))
    return [batches[i] for i in rng.permutation(len(batches))]


def by_number(size: int) -> Batching:
    """Return the batching by `size` proteins, fewer in the last batch."""
    return lambda proteins: [list(proteins[start : start + size]) for start in range(0, len(proteins), size)]


def real_tokens(batches: Batches) -> int:
    """Count the tokens of the proteins alone."""
    return sum(len(protein.input_ids) for batch in batches for protein in batch)


def padded_tokens(batches: Batches) -> int:
    """Count the tokens that are computed when each batch is padded to its longest protein."""
    return sum(len(batch) * max(len(protein.input_ids) for protein in batch) for batch in batches)


def pad(proteins: Sequence[MaskedTokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, attention mask (1 = keep) and labels, ``[b, s]`` each."""
    width = max(len(protein.input_ids) for protein in proteins)
    input_ids = torch.full((len(proteins), width), vocabulary.PAD)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, protein in enumerate(proteins):
        length = len(protein.input_ids)
        input_ids[row, :length] = torch.from_numpy(protein.input_ids)
        attention_mask[row, :length] = 1
        labels[row, torch.from_numpy(protein.label_positions)] = torch.from_numpy(protein.labels)
    return input_ids, attention_mask, labels


def pack(proteins: Sequence[MaskedTokens]) -> PackedBatch:
    """Return the proteins back to back."""
    lengths = [len(protein.input_ids) for protein in proteins]
    ends = list(itertools.accumulate(lengths, initial=0))
    positions = [protein.label_positions + start for protein, start in zip(proteins, ends, strict=False)]
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([protein.input_ids for protein in proteins])),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        seqlens=lengths,
        max_seqlen=max(lengths),
        label_positions=torch.from_numpy(np.concatenate(positions)),
        labels=torch.from_numpy(np.concatenate([protein.labels for protein in proteins])),
        label_counts=[len(protein.labels) for protein in proteins],
        num_tokens=ends[-1],
        num_residues=ends[-1] - 2 * len(proteins),
        num_sequences=len(proteins),
    )
