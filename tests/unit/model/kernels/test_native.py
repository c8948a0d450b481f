"""How the package's C++ is compiled and kept, and what is said where it cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from esm2mega import processor
from esm2mega.model.kernels import native

LAST = "while [ $# -gt 1 ]; do shift; done"  # shell: makes the last argument the first


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Forget the loaded libraries; give a new cache, and a compiler that copies an old one."""
    if (defect := native.defect()) is not None:
        pytest.skip(defect)
    compiler = tmp_path / "bin/g++"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\n{LAST}; exec cp {native.library('native_rotary')._name} $1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    native._loaded.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    native._loaded.cache_clear()


def test_it_is_compiled_once(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.defect() is None
    kept = sorted((no_library / "cache/esm2mega/kernels").glob("*.so"))
    assert len(kept) == len(native.CONTRACTION)
    native._loaded.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert native.defect() is None
    monkeypatch.setattr(processor, "identity", lambda: "another one, with the same home")
    native._loaded.cache_clear()
    assert "no C++ compiler" in str(native.defect())
    assert kept == sorted((no_library / "cache/esm2mega/kernels").glob("*.so"))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("echo 'x.cpp:1: error: no such flag' >&2; exit 1", "g++ failed: x.cpp:1: error: no such flag"),
        ("exit 3", "g++ failed: no message"),
        (f"{LAST}; echo 'no library' >$1", "file too short"),
        ("sleep 9", "took longer"),
    ],
)
def test_a_compiler_that_fails_is_one_line(
    no_library: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    (no_library / "bin/g++").write_text(f"#!/bin/sh\n{program}\n")
    monkeypatch.setattr(native, "SECONDS", 0.5)
    defect = native.defect()
    assert defect is not None and reason in defect and "\n" not in defect
    assert not list((no_library / "cache/esm2mega/kernels").glob("*.so")), "the next start tries again"


def test_a_cache_that_cannot_be_written_and_another_users_library_are_refused(
    no_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_library / "cache").write_text("a file where the folder should be")
    assert "cannot be written" in str(native.defect()) or "Not a directory" in str(native.defect())
    (no_library / "cache").unlink()
    assert native.defect() is not None, "a process asks once"
    native._loaded.cache_clear()
    assert native.defect() is None
    native._loaded.cache_clear()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(native.NotCompiledError, match="belongs to another user"):
        native.library("native_rotary")
