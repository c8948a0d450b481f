"""Masked proteins in batches: divided among them, padded or packed, the same for every contender."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from esm2mega import vocabulary
from esm2mega.batch import PackedBatch
from esm2mega.config.schema import DataConfig
from esm2mega.data.stream.masking import MaskedTokens, mask_tokens

IGNORED_LABEL = -100

Batches = list[list[MaskedTokens]]
"""Proteins as masked tokens, `<cls>` and `<eos>` included, batch by batch."""

Batching = Callable[[Sequence[MaskedTokens]], Batches]
"""Divides proteins, in their order, among batches."""

# Residues of 8,000 sequences of UniRef90, longer ones cut at 1,022: every twentieth part of them.
UNIREF_QUANTILES = (
    *(12, 71, 95, 119, 139, 163, 188, 213, 245, 261, 277),
    *(297, 321, 348, 369, 399, 439, 492, 565, 737, 1022),
)


def uniref_lengths(tokens: int, seed: int) -> list[int]:
    """Draw lengths that are distributed like those of UniRef90 and add up to `tokens`.

    Returns:
        Tokens of each protein, `<cls>` and `<eos>` included; the last one is what remains.
    """
    rng = np.random.default_rng(seed)
    parts = np.linspace(0, 1, len(UNIREF_QUANTILES))
    shortest, longest = UNIREF_QUANTILES[0] + 2, UNIREF_QUANTILES[-1] + 2
    lengths: list[int] = []
    room = tokens
    while room:
        length = min(int(np.interp(rng.random(), parts, UNIREF_QUANTILES)) + 2, room)
        if room - length < shortest:
            length = room if room <= longest else length - shortest
        lengths.append(length)
        room -= length
    return lengths


def random_residues(lengths: Sequence[int], seed: int) -> list[npt.NDArray[np.uint8]]:
    """Draw standard residues.

    Args:
        lengths: Tokens of each protein, the `<cls>` and `<eos>` that it will get included.
        seed: Of the draw.

    Returns:
        Token ids of each, [l - 2].
    """
    rng = np.random.default_rng(seed)
    pool = np.array(vocabulary.STANDARD_RESIDUES, dtype=np.uint8)
    return [rng.choice(pool, size=length - 2) for length in lengths]


def random_proteins(lengths: Sequence[int], seed: int) -> list[MaskedTokens]:
    """Mask proteins of `random_residues`."""
    proteins = random_residues(lengths, seed)
    return [mask_protein(residues, number, seed) for number, residues in enumerate(proteins)]


def mask_protein(residues: npt.NDArray[np.uint8], number: int, seed: int) -> MaskedTokens:
    """Put `<cls>` and `<eos>` around token ids of residues, and mask them as training does.

    Args:
        residues: Token ids, [l].
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


def by_number(size: int) -> Batching:
    """Return the batching by `size` proteins, fewer in the last batch."""
    return lambda proteins: [list(proteins[start : start + size]) for start in range(0, len(proteins), size)]


def real_tokens(batches: Batches) -> int:
    """Tokens of the proteins alone."""
    return sum(len(protein.input_ids) for batch in batches for protein in batch)


def padded_tokens(batches: Batches) -> int:
    """Tokens that are computed when each batch is padded to its longest protein."""
    return sum(len(batch) * max(len(protein.input_ids) for protein in batch) for batch in batches)


def pad(proteins: Sequence[MaskedTokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, attention mask (1 = keep) and labels, [b, s] each."""
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
