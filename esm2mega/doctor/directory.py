"""Tries in a directory what runs need of its file system: sync, rename, locks and free space."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from esm2mega.doctor.finding import FAILED, OK, Finding
from esm2mega.files import real_path

FREE_GIB = 1.0
LOCK_CURE = "mount it with locks (NFS: without nolock, Lustre: with -o flock), or keep runs elsewhere"
PREFIX = ".esm2mega-doctor-"


def check_directory(directory: Path) -> Iterator[Finding]:
    """Try in `directory` what checkpoints need and what keeps two runs apart, and leave nothing there."""
    what = f"directory {real_path(directory)}"
    if not directory.is_dir():
        found = directory.exists()
        yield Finding(
            FAILED,
            f"{what} {'is a file' if found else 'does not exist'}",
            "name a directory" if found else "create it or name another one",
        )
        return
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=directory) as scratch:
            defect = write_defect(Path(scratch))
            locks = None if defect else lock_defect(Path(scratch))
        free = shutil.disk_usage(directory).free / 2**30
    except OSError as error:
        yield Finding(
            FAILED,
            f"{what}: {error.strerror or error}",
            "fix its permissions, free space or name another one",
        )
        return
    if defect:
        yield Finding(FAILED, f"{what}: {defect}", "do not keep runs there")
        return
    yield Finding(OK, f"{what}: write, sync, rename and read back")
    if locks:
        yield Finding(FAILED, f"{what}: {locks}", LOCK_CURE)
    else:
        yield Finding(OK, f"{what}: a lock keeps other processes out")
    if free < FREE_GIB:
        yield Finding(
            FAILED,
            f"{what}: {free:.1f} GiB free",
            f"free at least {FREE_GIB:.0f} GiB for checkpoints, or name another one",
        )
    else:
        yield Finding(OK, f"{what}: {free:.0f} GiB free")


def write_defect(scratch: Path) -> str | None:
    """Write a directory and rename it, as checkpoints are made, and return what went wrong, or None.

    Raises:
        OSError: The file system refuses one of the operations.
    """
    before, after = scratch / "step.tmp", scratch / "step"
    before.mkdir()
    payload = os.urandom(1 << 20)
    write_synced(before / "data", payload)
    before.rename(after)
    if before.exists() or (after / "data").read_bytes() != payload:
        return "read back other bytes than written"
    # A small file is replaced whole: readers see the old or the new content.
    write_synced(scratch / "state.tmp", payload[:1024])
    os.replace(scratch / "state.tmp", after / "data")
    if (after / "data").read_bytes() != payload[:1024]:
        return "a file that replaced another one has other content"
    before.mkdir()
    with contextlib.suppress(OSError):
        before.rename(after)
        return "a directory can be renamed onto one that holds files"
    return None


def write_synced(path: Path, payload: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as handle:
        handle.write(payload)
        handle.flush()
        os.fsync(handle.fileno())


def lock_defect(scratch: Path) -> str | None:
    """Take a lock, let another process try to, and return what went wrong, or None."""
    path = scratch / "lock"
    try:
        with filelock.FileLock(path, timeout=0):
            while_held = _try_apart(path)
    except (OSError, NotImplementedError) as error:  # filelock's word for a file system without flock
        return f"it takes no locks ({getattr(error, 'strerror', None) or error})"
    if while_held != "held":
        return f"a lock that one process holds is {while_held} for another one"
    after = _try_apart(path)
    return None if after == "free" else f"a lock that was given back is {after} for another process"


def try_lock(path: Path) -> str:
    """Return whether a lock is ``held`` by another process, ``free``, or an error."""
    try:
        with filelock.FileLock(path, timeout=0):
            return "free"
    except filelock.Timeout:
        return "held"
    except (OSError, NotImplementedError) as error:
        return str(error)


def _try_apart(path: Path) -> str:
    """Try a lock in another process: some file systems give one process the same lock again."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from pathlib import Path; "
        f"from esm2mega.doctor.directory import try_lock; print(try_lock(Path({str(path)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"an error ({done.stderr.strip().rpartition(chr(10))[2]})"
