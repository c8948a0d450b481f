"""The commands that need rights or packages of the machine clean up, and say why they cannot run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from tests import namespaces

ROOT = Path(__file__).parents[2]
NEEDS_NAMESPACES = pytest.mark.skipif(namespaces.why_not({}) is not None, reason=str(namespaces.why_not({})))

# What starts a daemon inside, and writes down the names of its host and network before it waits.
DAEMON = """
import subprocess, sys, time
sleep = subprocess.Popen(["sleep", "{name}"], start_new_session=True)
with open(sys.argv[1], "w") as file:
    file.write(subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout)
time.sleep({seconds})
{end}
"""


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [
        ("tests.multinode", "tests.multinode", "iproute2"),
        ("tests.slurm", "tests.slurm", "slurmctld"),
        ("tests.image.run", "image-root", "debootstrap"),
    ],
)
def test_what_is_missing_is_named_with_exit_code_77(
    module: str, name: str, package: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 77
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name} cannot run: ") and "setpriv, unshare" in line
    assert "apt-get install --no-install-recommends" in line and package in line
    # A program in the network of the machine needs no tool to make one.
    assert (": ip, " in line) == (module != "tests.image.run")


def test_a_machine_that_makes_no_namespaces_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, body in (
        ("ip", "true"),
        ("setpriv", "true"),
        ("unshare", "echo 'not permitted' >&2; exit 1"),
    ):
        (tmp_path / command).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for network in (True, False):
        reason = namespaces.why_not({}, network)
        assert reason == "it needs root and a kernel that makes namespaces (not permitted)"


def name_of_daemon(tmp_path: Path) -> str:
    """Return how long the daemon of this test sleeps, by which it is told from those of other tests."""
    return f"{1e6 + zlib.crc32(str(tmp_path).encode()):.0f}"


def daemons(tmp_path: Path) -> list[str]:
    command = ["pgrep", "--full", f"^sleep {name_of_daemon(tmp_path)}$"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def start(tmp_path: Path, seconds: float, end: str = "") -> tuple[subprocess.Popen[str], Path]:
    """Start a program inside, and wait until it has started its daemon."""
    written = tmp_path / "links"
    code = DAEMON.format(name=name_of_daemon(tmp_path), seconds=seconds, end=end)
    inside = [sys.executable, "-c", code, str(written)]
    outside = f"from tests.namespaces import run_inside; raise SystemExit(run_inside({inside!r}))"
    process = subprocess.Popen([sys.executable, "-c", outside], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (written.exists() and written.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, written


@NEEDS_NAMESPACES
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_command_is_stopped(number: signal.Signals, tmp_path: Path) -> None:
    process, written = start(tmp_path, 60)
    try:
        assert len(daemons(tmp_path)) == 1
        # It has a network of its own, in which there is the loopback device at most.
        assert all(": lo: " in line for line in written.read_text().splitlines())
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
    deadline = time.monotonic() + 10
    while daemons(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not daemons(tmp_path)
    assert process.returncode != 0


@NEEDS_NAMESPACES
def test_nothing_is_left_of_a_program_that_fails(tmp_path: Path) -> None:
    process, _ = start(tmp_path, 0, "raise SystemExit(3)")
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert not daemons(tmp_path)
