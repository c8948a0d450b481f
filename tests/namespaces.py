"""Runs a program in Linux namespaces of its own: network, processes, mounts and host name.

The kernel cleans up. The program is process 1 of its namespace: when it ends, however it ends, everything
that it started ends with it, also daemons, and the network and the mounts that it made are gone. Killing what
started it ends it too. Nothing else that runs on this machine is seen from inside or can be hit by mistake.
"""

from __future__ import annotations

import importlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

CANNOT_RUN = 77
"""Exit code of a program that this machine lacks packages or rights for; automake's for a skipped test."""

PACKAGES = {"setpriv": "util-linux", "unshare": "util-linux"}
"""Commands that are needed for every program, and the Debian packages that have them."""

_KINDS = ("--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc")
"""What `unshare` separates. A new process namespace needs a new process, and its own /proc."""


class TrialFailed(Exception):
    """What the program inside was to show is not so; the message has the last output of what failed."""


def why_not(packages: Mapping[str, str], network: bool = True) -> str | None:
    """Return why a program that needs these commands cannot run here; None if it can.

    Args:
        packages: Name of the Debian package for each command, besides `PACKAGES`.
        network: Whether the program gets a network of its own, or uses that of the machine.
    """
    needed = {**({"ip": "iproute2"} if network else {}), **PACKAGES, **packages}
    absent = [command for command in needed if shutil.which(command) is None]
    if absent:
        names = " ".join(sorted({needed[command] for command in absent}))
        return f"{', '.join(absent)} not found; on Debian: apt-get install --no-install-recommends {names}"
    probe = ["ip", "link", "set", "lo", "up"] if network else ["true"]
    tried = subprocess.run([*_unshare(network), *probe], capture_output=True, text=True)
    if tried.returncode:
        return f"it needs root and a kernel that makes namespaces ({tried.stderr.strip()})"
    return None


def run_inside(command: Sequence[str], network: bool = True) -> int:
    """Run a command in new namespaces, see `why_not`, and return its exit code; it dies with this process."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    # `setpriv` has the kernel kill `unshare`, and that its child, when this process is killed.
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *_unshare(network), *command])
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()
        signal.signal(signal.SIGTERM, previous)


def _unshare(network: bool) -> list[str]:
    return ["unshare", *_KINDS, *(["--net"] if network else []), "--"]


def main(module: str, packages: Mapping[str, str]) -> int:
    """Be the command ``python -m module [--out DIR]``; its exit code is 0, 1, or 77 with the reason.

    Args:
        module: Package of the trial. This function starts it again inside, and calls there ``inside`` of its
            module ``trial`` with an empty directory; a `TrialFailed` is the end.
        packages: See `why_not`.
    """
    words = sys.argv[1:]
    if words[:1] == ["--inside"]:
        try:
            importlib.import_module(f"{module}.trial").inside(Path(words[1]))
        except TrialFailed as error:
            print(f"{module} failed: {error}", file=sys.stderr)
            return 1
        return 0
    if words and (words[0] != "--out" or len(words) != 2):
        print(
            f"usage: python -m {module} [--out DIR]; DIR, which must not exist, keeps all files",
            file=sys.stderr,
        )
        return 2
    if reason := why_not(packages):
        print(f"{module} cannot run: {reason}", file=sys.stderr)
        return CANNOT_RUN
    command = [sys.executable, "-m", module, "--inside"]
    if words:
        folder = Path(words[1]).resolve()
        folder.mkdir(parents=True)
        return run_inside([*command, str(folder)])
    with tempfile.TemporaryDirectory(prefix=module.rpartition(".")[2] + "-") as name:
        return run_inside([*command, name])


def say(text: str) -> None:
    """Print a line of the report."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def name_hosts(folder: Path, addresses: Mapping[str, str]) -> None:
    """Let names of hosts mean these addresses, and no other name anything; for use inside.

    Args:
        folder: Where the files are kept that stand in for those of /etc.
        addresses: Address by name.
    """
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    # Without a name server an unknown name is refused at once, not after seconds.
    (folder / "resolv.conf").write_text("")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for name in ("hosts", "resolv.conf"):
        subprocess.run(["mount", "--bind", str(folder / name), f"/etc/{name}"], check=True)
