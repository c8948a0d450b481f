"""The token store: what is written is read, megatron-core reads it too, nothing incomplete is accepted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from esm2mega import vocabulary
from esm2mega.data.store import store_files, verification
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.errors import DamagedError, UserError
from esm2mega.version import __version__
from tests.unit.data.cluster_ids import cluster_ids
from tests.unit.data.damage import edit_manifest, error_of

if TYPE_CHECKING:
    from tests.unit.data.conftest import WriteStore

SEQUENCES = ["MKTL", "acJ", "W", "LAGVSERTIDPKQNFYMHWC"]


def test_store_holds_what_was_written(write_store: WriteStore) -> None:
    store = write_store(SEQUENCES)
    assert len(store) == 4
    assert store.lengths.tolist() == [4, 3, 1, 20] and store.lengths.dtype == np.int32
    assert store.starts.tolist() == [0, 4, 7, 8]
    assert store.residues(1).tolist() == [5, 23, 3] and store.residues(1).dtype == np.uint8
    assert [vocabulary.decode(store.residues(i)) for i in range(4)] == ["MKTL", "AC<unk>", "W", SEQUENCES[3]]
    assert [store.id(i) for i in range(4)] == ["p0", "p1", "p2", "p3"]
    store.verify()


def test_residues_are_a_read_only_view(write_store: WriteStore) -> None:
    store = write_store(SEQUENCES)
    assert np.shares_memory(store.residues(0), store.tokens)
    with pytest.raises(ValueError, match="read-only"):
        store.residues(0)[0] = 5


@pytest.mark.parametrize("index", [-1, 4])
def test_ids_outside_the_store(write_store: WriteStore, index: int) -> None:
    with pytest.raises(IndexError):
        write_store(SEQUENCES).id(index)


def test_manifest(write_store: WriteStore) -> None:
    store = write_store(SEQUENCES)
    manifest = store.manifest
    assert manifest["format"] == "esm2mega token store" and manifest["format_version"] == 1
    assert manifest["created_by"] == f"esm2mega {__version__}"
    assert manifest["tokenizer_hash"] == vocabulary.TOKENIZER_HASH
    assert (manifest["sequences"], manifest["residues"]) == (4, 28)
    assert (manifest["lower_case_residues"], manifest["unknown_residues"]) == (2, 1)
    assert manifest["dropped_sequences"] == 0
    assert store.token_counts.tolist() == np.bincount(store.tokens, minlength=33).tolist()
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert sizes == {
        file.name: file.stat().st_size for file in store.path.iterdir() if file.name != "manifest.json"
    }


def test_batches_and_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [b"MKTLAC"[: 1 + i % 6] for i in range(25)]
    ids = [f"\u03b1{'x' * (i % 4)}" for i in range(25)]
    with StoreWriter(tmp_path / "one") as writer:
        writer.append(ids, sequences)
    monkeypatch.setattr(store_files, "BLOCK", 4)
    with StoreWriter(tmp_path / "many") as writer:
        for i in range(0, 25, 3):
            writer.append(ids[i : i + 3], sequences[i : i + 3])
            writer.append([], [])
    one, many = TokenStore(tmp_path / "one"), TokenStore(tmp_path / "many")
    assert one.manifest == many.manifest
    many.verify()
    assert [many.id(i) for i in range(25)] == ids


def test_megatron_core_reads_the_tokens(write_store: WriteStore) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    store = write_store(SEQUENCES)
    dataset = indexed_dataset.IndexedDataset(str(store.path / "tokens"))
    assert len(dataset) == 4
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    for i in range(4):
        np.testing.assert_array_equal(dataset[i], store.residues(i))
        assert dataset[i].dtype == np.uint8


def test_fingerprint_follows_the_proteins_only(tmp_path: Path) -> None:
    fingerprints = []
    for number, (ids, sequences) in enumerate(
        [(["a", "b"], [b"MK", b"T"]), (["c", "d"], [b"mk", b"T"]), (["a", "b"], [b"M", b"KT"])]
    ):
        with StoreWriter(tmp_path / str(number)) as writer:
            writer.append(ids, sequences)
        fingerprints.append(TokenStore(tmp_path / str(number)).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "store") as writer:
        writer.append(["a"], [b"MK"])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), StoreWriter(tmp_path / "store") as writer:
        writer.append(["a"], [b"MK"])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one sequence"), StoreWriter(tmp_path / "store"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_not_overwritten(write_store: WriteStore) -> None:
    store = write_store(SEQUENCES)
    with pytest.raises(UserError, match="exists already"):
        StoreWriter(store.path)


KILLED_BEFORE_RENAME = """
import os, signal, sys
from esm2mega.data.store.token_store import StoreWriter
os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
with StoreWriter(sys.argv[1]) as writer:
    writer.append(["a"], [b"MK"])
"""


def test_a_kill_between_writing_and_renaming_leaves_no_store(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_RENAME, str(tmp_path / "store")], timeout=60, check=False
    )
    (left,) = tmp_path.iterdir()
    assert (
        left / "manifest.json"
    ).is_file()  # complete in content: only the name tells that it was not finished
    assert "interrupted `prepare`" in error_of(left)
    assert "no such file and no such token store" in error_of(tmp_path / "store")
    with StoreWriter(tmp_path / "store") as writer:  # the next attempt is not in the way of the dead one
        writer.append(["a"], [b"MK"])
    assert len(TokenStore(tmp_path / "store")) == 1


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "ids.bin", "ids.offsets.npy"])
def test_error_for_a_missing_or_short_file(write_store: WriteStore, name: str) -> None:
    store = write_store(SEQUENCES)
    file = store.path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"{name}: has {len(content) - 1} bytes, its manifest says {len(content)}" in error_of(store.path)
    file.unlink()
    assert f"{name}: is missing: the token store is damaged; make it again" in error_of(store.path)


def test_error_for_an_index_of_other_data(write_store: WriteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(SEQUENCES)
    index = bytearray((store.path / "tokens.idx").read_bytes())
    index[34] += 1  # the first length
    (store.path / "tokens.idx").write_bytes(index)
    assert "tokens.idx: differs from its checksum" in error_of(store.path)
    monkeypatch.setattr(verification, "SMALL_BYTES", 0)
    TokenStore(store.path)  # opening reads no large file; verify does
    with pytest.raises(DamagedError, match=r"tokens\.idx: differs from its checksum") as caught:
        store.verify()
    assert caught.value.path == store.path / "tokens.idx"
    index[0] += 1
    (store.path / "tokens.idx").write_bytes(index)
    assert "is not a uint8 megatron-core index of 4 sequences" in error_of(store.path)
    edit_manifest(store, sequences=1 << 62)
    assert f"an index of {1 << 62} sequences has {20 * (1 << 62) + 42}" in error_of(store.path)


@pytest.mark.parametrize("head", [b"'shape': (4611686018427387904,)", b"'shape': (-1,)", b"'shape': ((((("])
def test_error_for_an_array_whose_head_claims_too_much(
    write_store: WriteStore, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    """A large array is opened before it is verified."""
    monkeypatch.setattr(verification, "SMALL_BYTES", 0)
    store = write_store(SEQUENCES)
    file = store.path / "ids.offsets.npy"
    content = file.read_bytes()
    old = b"'shape': (5,)" + b" " * (len(head) - len("'shape': (5,)"))
    at = content.index(b"'shape': (5,)")
    file.write_bytes(content[:at] + head + content[at + len(old) :])
    assert "ids.offsets.npy: is not a .npy file of int64" in error_of(store.path)


def write_clustered(path: Path) -> TokenStore:
    """Four proteins; cluster A holds rows 2 and 0, cluster \u03b2 row 3, in two batches."""
    with StoreWriter(path) as writer:
        writer.append_clusters(["A"], np.array([2]), np.array([2, 0]))
        writer.append([f"p{i}" for i in range(4)], [text.encode() for text in SEQUENCES])
        writer.append_clusters(["\u03b2"], np.array([1]), np.array([3]))
    return TokenStore(path)


def test_clusters_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_clustered(tmp_path / "store")
    store.verify()
    assert store.clusters is not None and len(store.clusters) == 2
    assert store.clusters.offsets.tolist() == [0, 2, 3] and store.clusters.offsets.dtype == np.int64
    assert store.clusters.members.tolist() == [2, 0, 3] and store.clusters.members.dtype == np.int64
    assert cluster_ids(store) == ["A", "\u03b2"]
    monkeypatch.setattr(store_files, "BLOCK", 1)
    assert write_clustered(tmp_path / "blocks").manifest == store.manifest


def test_a_store_without_clusters_stays_as_it_is(tmp_path: Path, write_store: WriteStore) -> None:
    plain, clustered = write_store(SEQUENCES), write_clustered(tmp_path / "clustered")
    assert plain.clusters is None
    assert not any("cluster" in name for name in [*plain.manifest, *plain.manifest["files"]])
    # Validation data are compared by it with training data, whichever has clusters.
    assert plain.fingerprint == clustered.fingerprint


@pytest.mark.parametrize(
    ("sizes", "members"), [([0, 1], [0]), ([1], [0, 1]), ([1, 1], [0]), ([1], [4]), ([1], [-1])]
)
def test_clusters_that_do_not_fit_are_refused(tmp_path: Path, sizes: list[int], members: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not fit|outside of the 4 rows"):  # noqa: SIM117
        with StoreWriter(tmp_path / "store") as writer:
            writer.append([f"p{i}" for i in range(4)], [text.encode() for text in SEQUENCES])
            writer.append_clusters(["c"] * len(sizes), np.array(sizes), np.array(members))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["clusters.offsets.npy", "clusters.members.npy", "clusters.ids.bin", "clusters.ids.offsets.npy"],
)
def test_error_for_damaged_cluster_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = write_clustered(tmp_path / "store")
    file = store.path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"{name}: has {len(content) - 1} bytes, its manifest says {len(content)}" in error_of(store.path)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{name}: differs from its checksum" in error_of(store.path)
    monkeypatch.setattr(verification, "SMALL_BYTES", 0)  # large files are opened before they are verified
    file.write_bytes(b"\x00" * len(content))
    if name.endswith(".npy"):
        assert f"{name}: is not a .npy file of int64" in error_of(store.path)
    file.unlink()
    assert f"{name}: is missing: the token store is damaged" in error_of(store.path)
    files = {other: entry for other, entry in store.manifest["files"].items() if other != name}
    edit_manifest(store, files=files)
    assert f"manifest.json: lists other cluster files, but not {name}" in error_of(store.path)
