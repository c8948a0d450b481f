"""Checks the limits that the shell or the container sets for processes (`ulimit`)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from esm2mega.doctor.finding import FAILED, OK, WARNING, Finding

INFINIBAND = Path("/sys/class/infiniband")
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")

OPEN_FILES = 1024
"""Suffices for the sockets, shards and pipes of a process; each process has the limit for itself."""

THREADS = 1024
"""Suffices for the threads of two processes with their loaders on a machine of many cores."""

FILE_BYTES = 10 * 2**30
"""Is more than the largest file of a checkpoint of 650M in one process, 8 GB with the state of Adam."""

LOCKED_BYTES = 2**30
"""Suffices for the buffers that NCCL registers with InfiniBand."""


def check_limits() -> Iterator[Finding]:
    """Yield the limits on open files, threads, the size of files, locked memory and core files."""
    yield _at_least(
        "open files", resource.RLIMIT_NOFILE, "-n", OPEN_FILES, FAILED, "--ulimit nofile=65536:65536"
    )
    yield _at_least(
        "processes and threads", resource.RLIMIT_NPROC, "-u", THREADS, FAILED, "--ulimit nproc=65536"
    )
    yield _at_least("size of a file", resource.RLIMIT_FSIZE, "-f", FILE_BYTES, FAILED, "--ulimit fsize=-1")
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        yield _at_least(
            "locked memory", resource.RLIMIT_MEMLOCK, "-l", LOCKED_BYTES, WARNING, "--ulimit memlock=-1"
        )
    else:
        yield Finding(OK, f"locked memory: {_text(resource.RLIMIT_MEMLOCK)}; it matters with InfiniBand")
    yield _core_files()


def _at_least(what: str, limit: int, flag: str, need: int, state: str, docker: str) -> Finding:
    soft, hard = resource.getrlimit(limit)
    line = f"{what}: {_text(limit)}"
    if soft == resource.RLIM_INFINITY or soft >= need:
        return Finding(OK, line)
    enough = hard == resource.RLIM_INFINITY or hard >= need
    word = "unlimited" if hard == resource.RLIM_INFINITY else "$(ulimit -H " + flag + ")"
    cure = (
        f"ulimit {flag} {word}"
        if enough
        else f"let an administrator raise it in /etc/security/limits.conf, or docker run {docker}"
    )
    return Finding(state, f"{line}, and runs need {_amount(limit, need)}", cure)


def _core_files() -> Finding:
    """Warn of core files as large as a process, which a crash would write into the current directory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = CORE_PATTERN.read_text().strip() if CORE_PATTERN.exists() else "core"
    line = f"core files: {_text(resource.RLIMIT_CORE)}"
    if pattern.startswith("|"):
        return Finding(OK, f"{line}, given to a program")
    if soft == resource.RLIM_INFINITY:
        return Finding(
            WARNING,
            f"{line}: each process that crashes writes its whole memory to a file",
            "ulimit -c 0, or docker run --ulimit core=0",
        )
    return Finding(OK, line)


def _text(limit: int) -> str:
    return _amount(limit, resource.getrlimit(limit)[0])


def _amount(limit: int, number: int) -> str:
    if number == resource.RLIM_INFINITY:
        return "unlimited"
    if limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
        return str(number)
    return f"{number / 2**20:,.0f} MiB"
