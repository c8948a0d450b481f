"""Makes a directory whole or not at all, under another name beside its place, one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from esm2mega.data.store.manifest import PARTIAL_SUFFIX
from esm2mega.errors import MachineError, UserError


@contextmanager
def staging_directory(out: Path) -> Iterator[Path]:
    """Yield the directory beside `out` in which it is made, by one process at a time.

    No reader accepts what is in that directory. It may hold what a killed attempt has left, and is locked, so
    that the next attempt can go on from it: `files.appearing` begins anew each time and locks nothing. An
    OSError in the block becomes a MachineError.
    """
    staging = _staging_of(out)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(staging / "lock", timeout=0):
            yield staging
    except filelock.Timeout:
        raise UserError(
            f"{out}: another `prepare` is writing it; wait for it, or name another directory"
        ) from None
    except OSError as error:
        raise MachineError(
            f"{out}: cannot be written ({error.strerror or error}); nothing was kept"
        ) from error


def _staging_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.prepare{PARTIAL_SUFFIX}")


def check_new(out: Path) -> None:
    """Raise `UserError` if `out` exists: commands ask before they read inputs, and `staged` asks again.

    What an attempt has left beside `out` that was killed when it had just made it is removed.
    """
    if out.exists():
        left = _staging_of(out)
        with suppress(OSError, filelock.Timeout):
            if left.is_dir():
                with filelock.FileLock(left / "lock", timeout=0):
                    shutil.rmtree(left)
        raise UserError(f"{out}: exists already; name another directory or remove it")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a new directory that becomes `out` at the end of the block; an exception leaves nothing."""
    check_new(out)
    with staging_directory(out) as staging:
        try:
            made = staging / "out"
            shutil.rmtree(made, ignore_errors=True)  # left by an attempt that was killed
            made.mkdir()
            yield made
            os.rename(made, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
