"""Files of limited size: cut exactly, and read as one array."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import numpy as np
import pytest

from esm2mega import vocabulary
from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
from esm2mega.data.store.shards import SHARD_UNIT, map_files
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.errors import UserError


def mapped_areas(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


@pytest.fixture
def sequences() -> list[bytes]:
    """3.5 MiB of residues; some proteins lie across two files or three."""
    rng = np.random.default_rng(1)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    lengths = [3, SHARD_UNIT - 3, 1, SHARD_UNIT + 77, SHARD_UNIT // 2, SHARD_UNIT, 5]
    return [rng.choice(letters, size=length).tobytes() for length in lengths]


def write(path: Path, sequences: list[bytes], shard_bytes: int) -> TokenStore:
    with StoreWriter(path, shard_bytes) as writer:
        for number, sequence in enumerate(sequences):
            writer.append([f"p{number}"], [sequence])
    return TokenStore(path)


def test_shards_hold_the_bytes_of_the_whole(tmp_path: Path, sequences: list[bytes]) -> None:
    whole = write(tmp_path / "whole", sequences, 1 << 30)
    sharded = write(tmp_path / "sharded", sequences, SHARD_UNIT)
    names = sorted(file.name for file in sharded.path.glob("tokens*.bin"))
    assert names == [f"tokens-{i:05d}.bin" for i in range(4)]
    assert b"".join((sharded.path / name).read_bytes() for name in names) == whole.tokens.tobytes()
    assert [(sharded.path / name).stat().st_size for name in names[:-1]] == [SHARD_UNIT] * 3
    assert (sharded.path / "tokens.idx").read_bytes() == (whole.path / "tokens.idx").read_bytes()
    assert sharded.manifest["tokens_sha256"] == hashlib.sha256(whole.tokens.tobytes()).hexdigest()
    assert sharded.fingerprint == whole.fingerprint
    sharded.verify()


def test_a_reader_sees_one_array(tmp_path: Path, sequences: list[bytes]) -> None:
    store = write(tmp_path / "store", sequences, SHARD_UNIT)
    assert [vocabulary.decode(store.residues(i)).encode() for i in range(len(store))] == sequences
    assert store.tokens.dtype == np.uint8 and store.tokens.shape == (sum(map(len, sequences)),)
    assert np.shares_memory(store.residues(3), store.tokens)
    with pytest.raises(ValueError, match="read-only"):
        store.residues(0)[0] = 5


def test_the_mapping_ends_with_the_last_array(tmp_path: Path, sequences: list[bytes]) -> None:
    store = write(tmp_path / "store", sequences, SHARD_UNIT)
    residues = store.residues(3)
    expected = residues.copy()
    del store
    gc.collect()
    assert mapped_areas(tmp_path) == 4
    np.testing.assert_array_equal(residues, expected)  # a view keeps the files mapped
    del residues
    gc.collect()
    assert mapped_areas(tmp_path) == 0


def test_one_file_that_fits_keeps_its_name(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [b"M" * SHARD_UNIT], SHARD_UNIT)
    assert sorted(file.name for file in store.path.glob("tokens*.bin")) == ["tokens.bin"]
    assert len(map_files([store.path / "tokens.bin"])) == SHARD_UNIT


def test_damage_to_a_shard_is_found(tmp_path: Path, sequences: list[bytes]) -> None:
    store = write(tmp_path / "store", sequences, SHARD_UNIT)
    file = store.path / "tokens-00001.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokens-00001\.bin: differs from its checksum"):
        TokenStore(store.path).verify()
    file.unlink()
    with pytest.raises(UserError, match=r"tokens-00001\.bin: is missing"):
        TokenStore(store.path)


def test_prepare_takes_the_limit(tmp_path: Path, sequences: list[bytes]) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_bytes(b"".join(b">p%d\n%s\n" % item for item in enumerate(sequences)))
    prepare_fasta([fasta], tmp_path / "out", options=PrepareOptions(shard_bytes=2 * SHARD_UNIT))
    store = TokenStore(tmp_path / "out" / "train")
    assert len(list(store.path.glob("tokens-*.bin"))) == 2
    assert [vocabulary.decode(store.residues(i)).encode() for i in range(len(store))] == sequences
    with pytest.raises(UserError, match="is not a multiple of 1048576 above 0"):
        prepare_fasta([fasta], tmp_path / "other", options=PrepareOptions(shard_bytes=SHARD_UNIT + 1))
