"""The script that executes a Dockerfile says why it cannot, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.image import dockerfile, run
from tests.image.run import Root, main
from tests.namespaces import CANNOT_RUN, TrialFailed


def outcome(code: int, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", text)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("alpine:3", "its base alpine:3 is not python:VERSION-slim-RELEASE of Debian"),
        ("python:3.11-slim-bookworm", "debootstrap of bookworm from http://mirror: E: no network"),
    ],
)
def test_a_debian_that_cannot_be_had_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    base: str,
    reason: str,
) -> None:
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **kwargs: outcome(1, "I: x\nE: no network"))
    words = ["--inside", str(tmp_path), "--build-arg", f"BASE_IMAGE={base}", "--mirror", "http://mirror"]
    assert main(words) == CANNOT_RUN
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 77])
def test_the_directory_is_removed_and_the_code_handed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    def made(command: Sequence[str], network: bool) -> int:
        folder = Path(command[command.index("--inside") + 1])
        assert folder.parent == tmp_path and not network
        (folder / "made").touch()
        return code

    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run, "why_not", lambda packages, network: None)
    monkeypatch.setattr(run, "run_inside", made)
    assert main([]) == code
    assert list(tmp_path.iterdir()) == []


def test_files_are_copied_as_an_engine_does(tmp_path: Path) -> None:
    root = Root(tmp_path, dockerfile.Image())
    for text in ("setup.py README.md ./", "conf conf"):
        root.copy(dockerfile.Step("COPY", text, {}, "/opt/x", "root"))
    made = tmp_path / "opt" / "x"
    assert {path.name for path in made.iterdir()} == {"setup.py", "README.md", "conf"}
    assert (made / "conf" / "base.yaml").read_text() == (run.REPOSITORY / "conf" / "base.yaml").read_text()


def test_a_command_that_fails_is_reported_with_its_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Root(tmp_path, dockerfile.Image())
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # Stands in for chroot: leaves its own arguments out and runs the rest here.
    (tmp_path / "chroot").write_text('#!/bin/sh\nshift 3\nexec "$@"\n')
    (tmp_path / "chroot").chmod(0o755)
    work = str(tmp_path)
    root.run('test "$NAME" = value', "1:1", work, {"NAME": "value"})
    with pytest.raises(TrialFailed) as caught:
        root.run("echo the reason; exit 3", "1:1", work, {})
    assert "exit code 3\nthe reason" in str(caught.value)
