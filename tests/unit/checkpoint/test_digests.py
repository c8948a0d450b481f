"""Digests are those of another program; what differs, is missing or cannot be read is told apart."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from esm2mega.checkpoint import digests, layout
from esm2mega.checkpoint.digests import read_digests, verify
from esm2mega.errors import DamagedError, MachineError
from esm2mega.files import json_sha256
from tests.unit.conftest import TinyRun


@pytest.fixture
def checkpoint(finished: TinyRun, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    copy = tmp_path / "step_00000004"
    shutil.copytree(layout.step_dir(finished.run_dir, 4), copy)
    return copy


def entries_of(checkpoint: Path) -> digests.Entries:
    entries = read_digests(checkpoint)
    assert entries is not None
    return entries


def flip(path: Path, byte: int = 0, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_every_file_has_the_digest_that_sha256sum_computes(checkpoint: Path) -> None:
    names = [p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()]
    files = json.loads((checkpoint / "digests.json").read_text())["files"]
    assert sorted(files) == sorted({*names} - {"digests.json", "COMPLETE", "train_state.json"})
    summed = subprocess.run(["sha256sum", *files], cwd=checkpoint, capture_output=True, text=True, check=True)
    computed = {name: digest for digest, name in map(str.split, summed.stdout.splitlines())}
    assert computed == {name: entry["sha256"] for name, entry in files.items()}
    assert all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    command = "sha256sum digests.json | cut -c -64 | cmp - COMPLETE"
    subprocess.run(command, cwd=checkpoint, shell=True, check=True)
    verify(checkpoint, entries_of(checkpoint))


@pytest.mark.parametrize("name", ["model/__0_0.distcp", "model/.metadata", "config.yaml"])
def test_a_changed_file_is_named(checkpoint: Path, name: str) -> None:
    entries, path = entries_of(checkpoint), checkpoint / name
    flip(path, -1, 7)
    with pytest.raises(DamagedError, match="is damaged: its SHA-256 is not that of digests.json; ") as caught:
        verify(checkpoint, entries)
    assert caught.value.path == path and str(caught.value).startswith(f"{path}: ")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=f"bytes, digests.json says {entries[name]['bytes']}") as caught:
        verify(checkpoint, entries)
    assert caught.value.path == path
    path.unlink()
    with pytest.raises(DamagedError, match="is missing; use another checkpoint"):
        verify(checkpoint, entries)


@pytest.mark.parametrize("name", ["digests.json", "COMPLETE"])
def test_the_digests_are_compared_themselves(checkpoint: Path, name: str) -> None:
    flip(checkpoint / name, 5)
    with pytest.raises(DamagedError, match=r"digests.json: is damaged, or COMPLETE beside it"):
        read_digests(checkpoint)
    (checkpoint / name).write_text("")
    with pytest.raises(DamagedError):  # an empty COMPLETE beside digests is none of an earlier version
        read_digests(checkpoint)


def test_an_earlier_version_wrote_none(checkpoint: Path) -> None:
    (checkpoint / "digests.json").unlink()
    (checkpoint / "COMPLETE").write_text("")
    assert read_digests(checkpoint) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["model/__0_0.distcp", "config.yaml", "digests.json", "COMPLETE"])
def test_an_error_of_reading_is_no_damage(
    checkpoint: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, original = entries_of(checkpoint), builtins.open

    def open_(path: Any, *arguments: Any, **named: Any) -> Any:
        if Path(path) == checkpoint / name:
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **named)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(io, "open", open_)  # what pathlib opens with
    with pytest.raises(MachineError) as caught:
        verify(checkpoint, entries)
        read_digests(checkpoint)
    assert f"{checkpoint / name}: cannot be read: {os.strerror(number)}; " in str(caught.value)
    assert caught.value.exit_code == 1


def test_permissions_are_no_damage(checkpoint: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not hold root back")
    entries = entries_of(checkpoint)
    (checkpoint / "model").chmod(0)
    try:
        with pytest.raises(MachineError, match="Permission denied"):
            verify(checkpoint, entries)
    finally:
        (checkpoint / "model").chmod(0o700)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Files are read in pieces: a sparse one of 64 MiB needs a few of them."""
    import tracemalloc

    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 26)
    tracemalloc.start()
    try:
        digests.digest_files(tmp_path, ["a", "b"])
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_checksum_of_a_state_is_that_of_its_content(checkpoint: Path) -> None:
    """Order, white space and the type of keys do not matter, every value does."""
    content = {"b": [1, 0.1, None], "a": {2: "é", 10: True}}
    checksum = json_sha256(content)
    assert checksum == json_sha256({"a": {"10": True, "2": "é"}, "b": [1, 0.1, None]})
    assert checksum != json_sha256({**content, "b": [1, 0.1, 0]})
    state = json.loads((checkpoint / "train_state.json").read_text())
    assert state.pop("sha256") == json_sha256(state)


def test_the_error_reaches_other_ranks_whole() -> None:
    error = pickle.loads(pickle.dumps(DamagedError("folder/file", "is damaged", "copy it")))
    assert (str(error), error.damage) == ("folder/file: is damaged; copy it", "folder/file: is damaged")
    assert error.path == Path("folder/file") and error.exit_code == 2


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"files": 3},
        {"files": {"model/a": {"bytes": 1}}},
        {"files": {"config.yaml": []}},
        *(
            {"files": {name: {"bytes": 0, "sha256": ""}}}
            for name in ("/etc/hostname", "model/../../x", "a\0b")
        ),
    ],
)
def test_digests_that_no_save_wrote_open_no_file(checkpoint: Path, content: Any) -> None:
    """With a ``COMPLETE`` that agrees, as whoever makes a checkpoint can write it."""
    path = checkpoint / "digests.json"
    path.write_text(json.dumps(content))
    (checkpoint / "COMPLETE").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(DamagedError) as error:
        read_digests(checkpoint)
    assert error.value.path == path and "\n" not in str(error.value)
