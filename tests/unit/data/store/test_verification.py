"""Files of token stores against their checksums: no changed file is accepted, and none is a traceback."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from esm2mega.config.schema import DataConfig
from esm2mega.data.store import verification
from esm2mega.data.store.cache import open_store
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.data.store.verification import RECORD, BackgroundVerification, unverified, verify
from esm2mega.data.stream.build import piece_tokens
from esm2mega.data.stream.samples import TrainSamples
from esm2mega.errors import DamagedError, UserError
from tests.unit.data.damage import flip

FLIPS = 64


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Thirty proteins in ten clusters, with shards, so that there is every kind of file."""
    rng = np.random.default_rng(1)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    with StoreWriter(tmp_path / "store") as writer:
        residues = [rng.choice(letters, size=length).tobytes() for length in rng.integers(5, 90, 30)]
        writer.append([f"p\u03b2{number}" for number in range(30)], residues)
        writer.append_clusters([f"c{number}" for number in range(10)], np.full(10, 3), rng.permutation(30))
    return TokenStore(tmp_path / "store")


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every file counts as large and as long unchanged; the user's cache is a directory of the test."""
    monkeypatch.setattr(verification, "SMALL_BYTES", 0)
    monkeypatch.setattr(verification, "_SETTLED_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw_flips(store: TokenStore) -> list[tuple[str, int]]:
    """Files and bits, each file equally often."""
    rng = np.random.default_rng(16)
    names = sorted([*store.manifest["files"], "manifest.json"])
    chosen = [names[number % len(names)] for number in range(FLIPS)]
    return [(name, int(rng.integers(8 * (store.path / name).stat().st_size))) for name in chosen]


def test_no_flipped_bit_of_any_file_is_accepted(store: TokenStore) -> None:
    for name, bit in draw_flips(store):
        flip(store.path / name, bit)
        with pytest.raises(UserError) as caught:
            TokenStore(store.path)
        assert name in str(caught.value) and "\n" not in str(caught.value), (name, bit)
        flip(store.path / name, bit)
        TokenStore(store.path)


def read_all(store: TokenStore) -> None:
    """What a training reads of a store, up to the tokens of packs."""
    samples = TrainSamples([store], DataConfig(max_seq_length=64), 1)
    piece_tokens(samples.stores, samples(np.arange(40)))
    [store.id(row) for row in range(len(store))]


@pytest.mark.usefixtures("all_large")
def test_no_flipped_bit_of_a_large_file_is_a_traceback(store: TokenStore) -> None:
    """Arrays are verified first; what is used before the rest is verified can only be wrong in that."""
    found = set()
    for name, bit in draw_flips(store):
        flip(store.path / name, bit)
        try:
            damaged = TokenStore(store.path)
            verify([damaged], arrays_only=True)
            read_all(damaged)
        except UserError as error:
            assert name in str(error) and "\n" not in str(error), (name, bit)
            found.add(name)
        else:
            assert name in ("tokens.bin", "ids.bin", "clusters.ids.bin"), (name, bit)
            with pytest.raises(DamagedError, match=name):
                verify([damaged])
        flip(store.path / name, bit)
    # Tokens outside of the vocabulary and ids that are no text are noticed where they are read.
    assert found >= {"tokens.bin", "ids.bin", "tokens.idx", "clusters.members.npy", "manifest.json"}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are compared."""
    names: list[str] = []
    compare = verification.verify_file

    def noted(store: TokenStore, name: str, go_on: Callable[[], bool] = lambda: True) -> None:
        names.append(name)
        compare(store, name, go_on)

    monkeypatch.setattr(verification, "verify_file", noted)
    return names


@pytest.mark.usefixtures("all_large")
def test_a_large_file_is_compared_once_until_it_changes(
    store: TokenStore, tmp_path: Path, reads: list[str]
) -> None:
    everything = sorted(store.manifest["files"])
    verify([store])
    assert sorted(reads) == everything
    reads.clear()
    verify([TokenStore(store.path)])
    assert reads == []
    status = (store.path / "tokens.bin").stat()
    flip(store.path / "tokens.bin", 5)
    os.utime(store.path / "tokens.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DamagedError, match=r"tokens\.bin: differs from its checksum"):
        verify([store])
    flip(store.path / "tokens.bin", 5)
    reads.clear()
    verify([store])
    assert reads == ["tokens.bin"]
    # The record of a copy is about other files.
    shutil.copytree(store.path, tmp_path / "copy")
    assert sorted(unverified(TokenStore(tmp_path / "copy"))) == everything
    for content in ("", "[]", '{"tokens.bin": 3}', '{"tokens.bin": {"identity": []}}'):
        (store.path / RECORD).write_text(content)
        assert "tokens.bin" in unverified(store)


@pytest.mark.usefixtures("all_large")
def test_the_record_goes_into_the_users_cache_where_the_store_cannot_be_written(
    store: TokenStore, tmp_path: Path, reads: list[str]
) -> None:
    (store.path / RECORD).mkdir()
    verify([store])
    assert len(list((tmp_path / "cache" / "esm2mega" / "verified").iterdir())) == 1
    reads.clear()
    verify([store])
    assert reads == []


def test_small_files_and_fresh_ones_leave_no_record(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify([store])
    assert not (store.path / RECORD).exists()
    monkeypatch.setattr(verification, "SMALL_BYTES", 0)
    verify([store])
    assert not (store.path / RECORD).exists()
    monkeypatch.setattr(verification, "_SETTLED_SECONDS", 0.0)
    verify([store])
    assert (store.path / RECORD).exists()


@pytest.mark.usefixtures("all_large")
def test_the_background_finds_damage_and_stops_when_told(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = BackgroundVerification([store])
    assert good.num_bytes == sum(entry["bytes"] for entry in store.manifest["files"].values())
    assert good.wait(60) and good.problem is None and unverified(store) == []
    flip(store.path / "tokens.bin", 0)
    bad = BackgroundVerification([store])
    with pytest.raises(DamagedError, match=r"tokens\.bin: differs from its checksum"):
        bad.wait(60)
    assert isinstance(bad.problem, DamagedError) and bad.problem.path.name == "tokens.bin"
    (store.path / "tokens.bin").rename(store.path / "elsewhere")
    flip(store.path / "elsewhere", 0)
    monkeypatch.setattr(verification, "_AT_ONCE", 1)
    os.mkfifo(store.path / "tokens.bin")
    slow = BackgroundVerification([store])
    writer = os.open(store.path / "tokens.bin", os.O_WRONLY)  # returns once the thread has opened it
    assert not slow.wait(0.05)
    closing = threading.Thread(target=slow.close)
    closing.start()
    while closing.is_alive():  # the reader looks whether it is to stop between two reads
        with suppress(BrokenPipeError):  # it has stopped meanwhile
            os.write(writer, b"1")
        closing.join(0.01)
    os.close(writer)
    assert slow.problem is None


@pytest.mark.usefixtures("all_large")
def test_a_file_that_cannot_be_read_is_not_called_damaged(store: TokenStore) -> None:
    (store.path / "tokens.bin").unlink()
    (store.path / "tokens.bin").mkdir()
    with pytest.raises(IsADirectoryError):
        BackgroundVerification([store]).wait(60)


def test_a_damaged_store_of_the_cache_is_made_again_once_it_is_removed(tmp_path: Path) -> None:
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nMKTL\n>b\nACDE\n")
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    store = open_store(str(fasta), data, "", "data.train")
    flip(store.path / "tokens.bin", 1)
    with pytest.raises(DamagedError) as caught:
        open_store(str(fasta), data, "", "data.train")
    made = store.path.parent
    assert f"remove the directory {made}, and the same command makes it again" in str(caught.value)
    shutil.rmtree(made)
    assert open_store(str(fasta), data, "", "data.train").fingerprint == store.fingerprint
