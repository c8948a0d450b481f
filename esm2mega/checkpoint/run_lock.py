"""Lets one job at a time train in the directory of a run, and set damaged checkpoints of it aside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from esm2mega.errors import MachineError, UserError

_PATIENCE = 30.0
"""Seconds that a start waits for the lock: processes of a killed job, and leases of NFS, may outlive it."""


@contextmanager
def owning(run_dir: str | Path) -> Iterator[None]:
    """Hold the lock of a run's directory, which is made if need be; the kernel releases it after a kill.

    A file system without locks is said to be one, and the block runs without.

    Raises:
        UserError: Another job holds the lock.
        MachineError: The directory or the lock cannot be made.
    """
    path = Path(run_dir) / ".lock"
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE)
    except filelock.Timeout:
        raise UserError(
            f"run_dir={run_dir}: another job trains in it, and holds {path}; wait until it has ended, or "
            "choose another run_dir"
        ) from None
    except NotImplementedError:
        print(
            f"esm2mega: {path}: this file system has no locks: let one job at a time train here",
            file=sys.stderr,
        )
    except OSError as error:
        raise MachineError(
            f"{path}: cannot be made: {error.strerror or error}; choose another run_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
