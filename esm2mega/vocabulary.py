"""Holds the ESM-2 alphabet, and turns the bytes of residues into token ids and back.

One byte is one residue and one token. Lower case counts as upper case, and every byte outside the alphabet
becomes an `<unk>`. So residue i is always token i + 1 of `<cls>` residues `<eos>`, whatever the letters.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

# Order and spelling are those of the published ESM-2 checkpoints; an id is the position in this tuple.
VOCAB: tuple[str, ...] = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWC",
    *"XBUZO",
    *".-",
    *("<null_1>", "<mask>"),
)

CLS = 0
PAD = 1
EOS = 2
UNK = 3
NULL_1 = 31
MASK = 32

STANDARD_RESIDUES = range(4, 24)
"""These are the ids of the 20 standard amino acids."""

SPECIAL_TOKENS = (CLS, PAD, EOS, UNK, NULL_1, MASK)
"""These ids stand for no residue letter, and their positions are never chosen for prediction."""

# This is a part of the hash below: raise its version when the same text would be given other ids.
_RULES = "upper-case; one byte one token; other bytes <unk>; version 1"

TOKENIZER_HASH = hashlib.sha256("\n".join((*VOCAB, _RULES)).encode()).hexdigest()
"""This hash identifies vocabulary and rules; it is stored with everything made from token ids."""


def _byte_table() -> bytes:
    """Return the token id of each of the 256 byte values."""
    table = bytearray([UNK]) * 256
    for token_id, token in enumerate(VOCAB):
        if len(token) == 1:
            table[ord(token.upper())] = table[ord(token.lower())] = token_id
    return bytes(table)


_TOKEN_OF_BYTE = _byte_table()

_HISTOGRAM_BYTES = 1 << 14

UNKNOWN_BYTES = bytes(byte for byte in range(256) if _TOKEN_OF_BYTE[byte] == UNK)
"""These byte values have no token of their own."""


def encode_residues(residues: bytes | str) -> npt.NDArray[np.uint8]:
    """Encode residues, without adding `<cls>` and `<eos>`.

    Args:
        residues: L residue letters without white space. In a `str`, a character outside ASCII is one `<unk>`.

    Returns:
        Token ids [L].
    """
    if isinstance(residues, str):
        residues = residues.encode("ascii", errors="replace")
    return np.frombuffer(bytearray(residues.translate(_TOKEN_OF_BYTE)), dtype=np.uint8)


def decode(token_ids: npt.ArrayLike) -> str:
    """Return the text of token ids [L]: a letter per residue, and special tokens by name, such as `<unk>`."""
    return "".join(map(VOCAB.__getitem__, np.asarray(token_ids).tolist()))


def byte_histogram(residues: bytes) -> npt.NDArray[np.int64]:
    """Count how often each byte value occurs, [256]. Histograms of several texts may be added up."""
    values = np.frombuffer(residues, dtype=np.uint8)
    counts = np.zeros(256, dtype=np.int64)
    # numpy counts 8-byte integers; those of a piece fit into the cache, which is ten times faster.
    for first in range(0, len(values), _HISTOGRAM_BYTES):
        counts += np.bincount(values[first : first + _HISTOGRAM_BYTES], minlength=256)
    return counts


def token_histogram(byte_counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count how often each token id occurs, [33], from a byte histogram [256]."""
    counts = np.zeros(len(VOCAB), dtype=np.int64)
    np.add.at(counts, np.frombuffer(_TOKEN_OF_BYTE, dtype=np.uint8), byte_counts)
    return counts


def lower_case_count(byte_counts: npt.NDArray[np.int64]) -> int:
    """Return the number of residues written in lower case, from a byte histogram [256]."""
    return int(byte_counts[ord("a") : ord("z") + 1].sum())


def unknown_count(byte_counts: npt.NDArray[np.int64]) -> int:
    """Return the number of residues that become `<unk>`, from a byte histogram [256]."""
    return int(token_histogram(byte_counts)[UNK])
