"""Megatron data sets of ProteinLM: what megatron-core writes is read back; other vocabularies are refused."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from esm2mega.data.readers import megatron
from esm2mega.data.readers.megatron import VOCAB, MegatronReader
from esm2mega.data.store.token_store import StoreWriter
from esm2mega.errors import UserError

PROTEINS = ["MKTLAGV", "ACDEFGHIKLMNPQRSTVWYXBUZO", "W"]


def ids(text: str) -> list[int]:
    return [VOCAB.index(letter) for letter in text]


def write(tmp_path: Path, sequences: list[list[int]], dtype: type = np.uint16) -> Path:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    prefix = tmp_path / "pfam_text_document"
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix.with_name(prefix.name + ".idx")


def test_the_vocabulary_is_that_of_proteinlm() -> None:
    assert len(VOCAB) == 31
    assert {letter: VOCAB.index(letter) for letter in "AIKMZ"} == {"A": 6, "I": 14, "K": 15, "M": 17, "Z": 30}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_proteins_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    monkeypatch.setattr(megatron, "_BLOCK_SEQUENCES", 2)
    path = write(tmp_path, [ids(protein) for protein in PROTEINS], dtype)
    for name in (path, path.with_suffix(".bin"), path.with_suffix("")):
        reader = MegatronReader(name)
        found = [(record.id, record.residues.decode()) for record in reader]
        assert found == [("1", PROTEINS[0]), ("2", PROTEINS[1]), ("3", PROTEINS[2])]
        assert list(reader.checksums) == ["pfam_text_document.bin", "pfam_text_document.idx"]
        assert reader.notes() == [f"{name}: holds no ids, so the ids are sequence numbers"]


def test_specials_at_the_ends_go_and_unknown_residues_stay(tmp_path: Path) -> None:
    cls, sep, pad, unk = (VOCAB.index(f"[{name}]") for name in ("CLS", "SEP", "PAD", "UNK"))
    path = write(tmp_path, [[cls, *ids("MK"), unk, unk, *ids("T"), sep, pad, pad]])
    assert [record.residues for record in MegatronReader(path)] == [b"MKJJT"]  # J is <unk> in ESM-2


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([[6], [31]], r": sequence 2: has the token id 31; ids of ProteinLM's vocabulary are 0 to 30"),
        ([[6], [6, 2, 7]], r": sequence 2: has \[CLS\] between its residues"),
        ([[6], [1, 7]], r": sequence 2: has \[MASK\] between its residues"),
        ([[6], [2, 3]], r": sequence 2: has no residues"),
    ],
)
def test_what_is_no_protein_is_refused(tmp_path: Path, sequences: list[list[int]], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        list(MegatronReader(write(tmp_path, sequences)))


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = write(tmp_path, [ids("MKTL"), ids("AC")])
    index, data = path.read_bytes(), path.with_suffix(".bin").read_bytes()

    def error(new_index: bytes = index, new_data: bytes = data) -> str:
        path.write_bytes(new_index)
        path.with_suffix(".bin").write_bytes(new_data)
        with pytest.raises(UserError) as caught:
            list(MegatronReader(path))
        return str(caught.value)

    assert "sequence 2: lies outside of pfam_text_document.bin" in error(new_data=data[:-2])
    assert f"has {len(index) - 8} bytes instead of {len(index)}" in error(index[:-8])
    assert "is not the index of a Megatron data set" in error(b"PK" + index[2:])
    assert "is not the index of a Megatron data set" in error(index[:20])
    assert "version 1, dtype code 6" in error(index[:17] + b"\x06" + index[18:])
    negative = index[:34] + struct.pack("<i", -4) + index[38:]
    assert "sequence 1: lies outside" in error(negative)
    path.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"no such Megatron \.bin file"):
        MegatronReader(path)


def test_a_token_store_is_not_an_input(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(["a"], [b"MK"])
    with pytest.raises(UserError, match="belongs to a token store, which needs no preparing"):
        MegatronReader(tmp_path / "store" / "tokens.idx")
    shutil.rmtree(tmp_path / "store")


@pytest.mark.parametrize("size", [0, 1, 3])
def test_tokens_that_are_cut_short(tmp_path: Path, size: int) -> None:
    """Also to nothing, and within a token of two bytes."""
    path = write(tmp_path, [ids(PROTEINS[0])])
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:size])
    with pytest.raises(UserError, match="sequence 1: lies outside of pfam_text_document.bin"):
        list(MegatronReader(path))
