"""Draws the proteins that a benchmark runs on: from a FASTA, or made up with the lengths of UniRef90.

Legend: ``L`` residues of a protein.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.errors import UserError

Protein = npt.NDArray[np.uint8]
"""Holds the token ids of residues, without special tokens, ``[L]``."""

UNIREF_QUANTILES = (
    *(12, 71, 95, 119, 139, 163, 188, 213, 245, 261, 277),
    *(297, 321, 348, 369, 399, 439, 492, 565, 737, 1022),
)
"""Gives every twentieth part of the residues of 8,000 sequences, longer ones cut at 1,022.

They were drawn at random from a public sample of UniRef90: train.parquet of the recipe esm2_native_te in
NVIDIA's bionemo-framework.
"""

PADDED_TOKENS = 4096
"""Is the `--toks_per_batch` of fair-esm's extract.py, for all who pad."""


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


def random_residues(lengths: Sequence[int], seed: int) -> list[Protein]:
    """Draw standard residues.

    Args:
        lengths: Tokens of each protein, the `<cls>` and `<eos>` that it will get included.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    pool = np.array(vocabulary.STANDARD_RESIDUES, dtype=np.uint8)
    return [rng.choice(pool, size=length - 2) for length in lengths]


def read_proteins(fasta: Path, max_residues: int, most: int | None = None) -> list[Protein]:
    """Read the first `most` proteins of a FASTA file, None for all, and cut them to `max_residues`."""
    records = islice(FastaReader(fasta), most)
    return [vocabulary.encode_residues(record.residues[:max_residues]) for record in records]


def draw(proteins: Sequence[Protein], number: int, seed: int) -> list[Protein]:
    """Draw one protein from each of `number` slices of the proteins ordered by length.

    Raises:
        UserError: There are fewer.
    """
    _check(number, len(proteins), "proteins")
    by_length = sorted(proteins, key=len)
    borders = np.linspace(0, len(by_length), number + 1).astype(int)
    chosen = np.random.default_rng(seed).integers(borders[:-1], borders[1:])
    return [by_length[number] for number in chosen]


def extract_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return the batches of fair-esm's extract.py, which counts one token more than residues, not two.

    Args:
        lengths: Residues of each protein.

    Returns:
        Places of the proteins, batch by batch, shortest first.
    """
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and (lengths[i] + 1) * (len(batches[-1]) + 1) > PADDED_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def draw_batches(proteins: Sequence[Protein], number: int, seed: int) -> list[list[Protein]]:
    """Draw one of fair-esm's batches from each of `number` equal parts of all of them; 0 takes them all.

    So no batch has more padding than in a run over all proteins.

    Raises:
        UserError: There are fewer.
    """
    batches = extract_batches([len(protein) for protein in proteins])
    number = number or len(batches)
    _check(number, len(batches), "batches")
    borders = np.linspace(0, len(batches), number + 1).astype(int)
    chosen = np.random.default_rng(seed).integers(borders[:-1], borders[1:])
    return [[proteins[number] for number in batches[i]] for i in chosen]


def _check(wanted: int, present: int, what: str) -> None:
    if wanted > present:
        raise UserError(f"{wanted} {what} are to be drawn, and there are only {present}: give more proteins")
