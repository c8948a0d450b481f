"""The alphabet: literal ids, one token per byte, counts."""

from __future__ import annotations

import numpy as np
import pytest

from esm2mega import vocabulary


def test_vocabulary_is_that_of_the_published_checkpoints() -> None:
    expected = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
    assert " ".join(vocabulary.VOCAB) == expected
    assert len(vocabulary.VOCAB) == 33
    for name in ("CLS", "PAD", "EOS", "UNK", "NULL_1", "MASK"):
        assert vocabulary.VOCAB[getattr(vocabulary, name)] == f"<{name.lower()}>"
    assert "".join(vocabulary.VOCAB[i] for i in vocabulary.STANDARD_RESIDUES) == "LAGVSERTIDPKQNFYMHWC"


def test_ids_of_a_hand_written_sequence() -> None:
    ids = vocabulary.encode_residues(b"MKTLXBUZOJ*-.acdw")
    assert ids.dtype == np.uint8
    assert ids.tolist() == [20, 15, 11, 4, 24, 25, 26, 27, 28, 3, 3, 30, 29, 5, 23, 13, 22]


def test_each_unknown_residue_is_one_unk() -> None:
    assert vocabulary.encode_residues(b"MKJJjA").tolist() == [20, 15, 3, 3, 3, 5]
    assert vocabulary.encode_residues("MKéA").tolist() == [20, 15, 3, 5]


def test_every_byte_is_one_token() -> None:
    ids = vocabulary.encode_residues(bytes(range(256)))
    letters = {token: i for i, token in enumerate(vocabulary.VOCAB) if len(token) == 1}
    assert ids.tolist() == [letters.get(chr(byte).upper(), 3) if byte < 128 else 3 for byte in range(256)]
    assert bytes(np.flatnonzero(ids == vocabulary.UNK).astype(np.uint8)) == vocabulary.UNKNOWN_BYTES


def test_encoded_residues_are_writable_and_may_be_empty() -> None:
    ids = vocabulary.encode_residues(b"AC")
    ids[0] = vocabulary.MASK
    assert vocabulary.decode(ids) == "<mask>C"
    assert vocabulary.encode_residues(b"").tolist() == []


def test_decode_inverts_encode_but_for_case_and_unknown_residues() -> None:
    assert (
        vocabulary.decode(vocabulary.encode_residues(b"LAGVSERTIDPKQNFYMHWCXBUZO.-"))
        == "LAGVSERTIDPKQNFYMHWCXBUZO.-"
    )
    assert vocabulary.decode(vocabulary.encode_residues(b"mkJ")) == "MK<unk>"
    assert vocabulary.decode([0, 20, 2, 1]) == "<cls>M<eos><pad>"


def test_counts_come_from_one_histogram_and_add_up() -> None:
    first, second = b"MkjLL", b"*AAz-"
    counts = vocabulary.byte_histogram(first) + vocabulary.byte_histogram(second)
    assert counts.shape == (256,) and counts.sum() == 10
    assert vocabulary.lower_case_count(counts) == 3
    assert vocabulary.unknown_count(counts) == 2
    expected = np.bincount(vocabulary.encode_residues(first + second), minlength=33)
    np.testing.assert_array_equal(vocabulary.token_histogram(counts), expected)


def test_hash_is_pinned() -> None:
    # Stores and checkpoints carry this value: when it changes, all of them are refused.
    assert vocabulary.TOKENIZER_HASH == "7f1d1409f15d229dfa952904f76a38751965e6f6ed759f1a8e87c74452437a8e"


@pytest.mark.parametrize("token", ["<cls>", "<pad>", "<eos>", "<unk>", "<null_1>", "<mask>"])
def test_special_tokens(token: str) -> None:
    assert vocabulary.VOCAB.index(token) in vocabulary.SPECIAL_TOKENS
    assert len(vocabulary.SPECIAL_TOKENS) == 6
