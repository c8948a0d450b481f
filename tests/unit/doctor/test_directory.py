"""The doctor tries what runs need of a file system, and leaves nothing there."""

import errno
import os
import shutil
from pathlib import Path

import filelock
import pytest

from esm2mega.doctor import directory
from esm2mega.doctor.directory import check_directory, try_lock
from esm2mega.doctor.finding import FAILED, OK


def failed(folder: Path) -> str:
    """The one failure that is found, as it is printed."""
    (finding,) = (finding for finding in check_directory(folder) if finding.state == FAILED)
    assert list(folder.iterdir()) == []
    return str(finding)


def test_a_sound_directory(tmp_path):
    assert [finding.state for finding in check_directory(tmp_path)] == [OK, OK, OK]
    assert list(tmp_path.iterdir()) == []


def test_an_absent_directory(tmp_path):
    (finding,) = check_directory(tmp_path / "absent")
    assert finding.state == FAILED
    assert "does not exist" in finding.what


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory.os, "fsync", refuse)
    assert "No space left on device" in failed(tmp_path)


def test_little_free_space_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "FREE_GIB", 1e9)
    assert "GiB free; free at least" in failed(tmp_path)


def copies(self, target):
    """A rename as some object stores make it: by a copy, after which the old name is still there."""
    shutil.copytree(self, target)


def loses(self, target):
    """A rename after which the content is another one."""
    os.rename(self, target)
    Path(target, "data").write_bytes(b"")


def merges(self, target):
    """A rename that takes the place of a directory with files."""
    if Path(target).exists():
        shutil.rmtree(target)
    os.rename(self, target)


@pytest.mark.parametrize(
    ("rename", "text"),
    [
        (copies, "read back other bytes than written"),
        (loses, "read back other bytes than written"),
        (merges, "a directory can be renamed onto one that holds files"),
    ],
)
def test_a_rename_that_is_none_fails(tmp_path, monkeypatch, rename, text):
    monkeypatch.setattr(Path, "rename", rename)
    assert text in failed(tmp_path)


def test_a_replacement_that_is_none_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(directory.os, "replace", lambda before, after: None)
    assert "a file that replaced another one has other content" in failed(tmp_path)


def test_a_lock_that_others_do_not_see_fails(tmp_path, monkeypatch):
    """A lock of another kind, which the other process does not see, is what `nolock` mounts have."""
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    text = failed(tmp_path)
    assert "a lock that one process holds is free for another one; mount it with locks" in text


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")]
)
def test_a_file_system_without_locks_fails(tmp_path, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(filelock, "FileLock", refuse)
    assert f"it takes no locks ({error.args[-1]})" in failed(tmp_path)


def test_a_lock_that_stays_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "_try_apart", lambda path: "held")
    assert "a lock that was given back is held for another process" in failed(tmp_path)


def test_a_process_that_cannot_try_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(directory.sys, "executable", shutil.which("false"))
    assert "a lock that one process holds is an error" in failed(tmp_path)


def test_locks_are_held_or_free(tmp_path):
    assert try_lock(tmp_path / "lock") == "free"
    with filelock.FileLock(tmp_path / "lock"):
        assert try_lock(tmp_path / "lock") == "held"
    assert "File exists" in try_lock(tmp_path / "lock" / "lock")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = check_directory(tmp_path / "file")
    assert (finding.state, finding.cure) == (FAILED, "name a directory")
    assert "is a file" in finding.what
