"""Reads ProteinLM's data sets in Megatron's indexed format (`.bin` and `.idx`) back to residues.

ProteinLM wrote its PFAM corpus with a vocabulary of 31 tokens, one protein per sequence. The layout of the
index is that of megatron-core's `IndexedDataset`: a head (magic, u64 version 1, u8 dtype code, u64 number of
sequences, u64 number of document bounds), int32 lengths, int64 byte offsets, int64 document bounds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.readers.base import Block, ByteProgress, Record, RowSource, check_length
from esm2mega.errors import UserError

VOCAB = ("[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", "[unused1]", *"ABCDEFGHIKLMNOPQRSTUVWXYZ")
"""This is ProteinLM's `iupac_vocab.txt`: six special tokens and the letters except J; ids are positions."""

_HEAD = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
# These are the codes of the integer types; 6 and 7 are floating-point types.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}

_FIRST_LETTER = VOCAB.index("A")
_UNKNOWN = ord("J")  # a letter without a token in either vocabulary stands for [UNK]
_EDGES = tuple(VOCAB.index(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
_BLOCK_SEQUENCES = 1 << 16


def _letters() -> npt.NDArray[np.uint8]:
    """Return the residue letter of each token id, [31]; 0 where a token stands for none."""
    table = np.zeros(len(VOCAB), dtype=np.uint8)
    table[_FIRST_LETTER:] = np.frombuffer("".join(VOCAB[_FIRST_LETTER:]).encode(), dtype=np.uint8)
    table[VOCAB.index("[UNK]")] = _UNKNOWN
    return table


class MegatronReader(RowSource):
    """Reads the sequences of one data set; their ids are their numbers, from 1."""

    unit = ": sequence "

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Read the head of the index.

        Args:
            path: either file, or their common name without ending.
            progress: told about bytes of both files.
        """
        super().__init__(path, progress)
        stem = self.path.with_suffix("") if self.path.suffix in (".bin", ".idx") else self.path
        self._bin, self._idx = (stem.with_name(stem.name + end) for end in (".bin", ".idx"))
        for file in (self._idx, self._bin):
            self._check_file(file, f"Megatron {file.suffix}")
        if (stem.parent / "manifest.json").exists():
            raise UserError(
                f"{self.path}: belongs to a token store, which needs no preparing; use {stem.parent}"
            )
        self._dtype, self._count = self._read_head()

    def files(self) -> list[Path]:
        return [self._bin, self._idx]

    def notes(self) -> list[str]:
        return [f"{self.path}: holds no ids, so the ids are sequence numbers"]

    def records(self, block: Block) -> Iterator[Record]:
        lengths = self._map(np.dtype("<i4"), 0)
        offsets = self._map(np.dtype("<i8"), lengths.nbytes)
        # An empty file cannot be mapped; it also holds none of the sequences.
        size = self._bin.stat().st_size // self._dtype.itemsize
        tokens = (
            np.memmap(self._bin, self._dtype, "r", shape=(size,)).view(np.ndarray)
            if size
            else np.empty(0, self._dtype)
        )
        letters = _letters()
        for number in range(block.line, block.stop):
            first, length = int(offsets[number - 1]), int(lengths[number - 1])
            start, rest = divmod(first, self._dtype.itemsize)
            if rest or length < 0 or not 0 <= start <= len(tokens) - length:
                raise UserError(
                    f"{self.location(number)}: lies outside of {self._bin.name}; the two files do not belong "
                    "together, or one is damaged"
                )
            check_length(length, self.location(number), str(number))
            yield Record(str(number), self._residues(tokens[start : start + length], letters, number), number)

    def _residues(self, tokens: npt.NDArray[Any], letters: npt.NDArray[np.uint8], number: int) -> bytes:
        """Return the letters of token ids, [length], without [CLS], [SEP] and [PAD] at the ends."""
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(VOCAB):
            wrong = tokens[(tokens < 0) | (tokens >= len(VOCAB))][0]
            raise UserError(
                f"{self.location(number)}: has the token id {wrong}; ids of ProteinLM's vocabulary are 0 to "
                f"{len(VOCAB) - 1}: data sets of other vocabularies are not read, so give FASTA instead"
            )
        inside = np.flatnonzero(~np.isin(tokens, _EDGES))
        if not len(inside):
            raise UserError(f"{self.location(number)}: has no residues; make the data set again without it")
        tokens = tokens[inside[0] : inside[-1] + 1]
        residues = letters[tokens]
        if not residues.all():
            token = VOCAB[tokens[residues == 0][0]]
            raise UserError(
                f"{self.location(number)}: has {token} between its residues; make the data set again with "
                "one protein per sequence and without masks"
            )
        return residues.tobytes()

    def _ranges(self) -> list[tuple[int, int]]:
        firsts = range(0, self._count, _BLOCK_SEQUENCES)
        return [(first, min(first + _BLOCK_SEQUENCES, self._count)) for first in firsts]

    def _read_head(self) -> tuple[np.dtype[Any], int]:
        with open(self._idx, "rb") as stream:
            head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise UserError(f"{self._idx}: is not the index of a Megatron data set")
        _, version, code, count, bounds = _HEAD.unpack(head)
        if version != 1 or code not in _DTYPES:
            raise UserError(
                f"{self._idx}: version {version}, dtype code {code}; version 1 of integers is read"
            )
        expected, found = _HEAD.size + 12 * count + 8 * bounds, self._idx.stat().st_size
        if found != expected:
            raise UserError(f"{self._idx}: has {found} bytes instead of {expected}; copy or make it again")
        if not count:
            raise UserError(f"{self._idx}: has no sequences")
        return np.dtype(_DTYPES[code]), count

    def _map(self, dtype: np.dtype[Any], offset: int) -> npt.NDArray[Any]:
        """Map an array of the index with one entry per sequence, [n]."""
        start = _HEAD.size + offset
        return np.memmap(self._idx, dtype=dtype, mode="r", offset=start, shape=(self._count,)).view(
            np.ndarray
        )
