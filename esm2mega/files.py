"""Writes files whole or not at all, hashes and checks them, and shortens lists of names for messages."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esm2mega.errors import MachineError, UserError

OTHER_OUT = "choose another --out"
"""This tells the user what to do about a result that cannot be written."""

_HASHED_AT_ONCE = 1 << 20


@contextmanager
def replacing(path: Path, cure: str = "", durable: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` in one step when the block ends without an error.

    A kill at any moment leaves the old file or the new one. After an error nothing of the new one remains.

    Args:
        path: The file to replace. The directories above it are made.
        cure: What the user can do about an error, for the message.
        durable: Return only when the file is on the disk under its name, so that a power cut loses nothing.

    Raises:
        MachineError: The file cannot be written.
    """
    with _growing(path, cure) as partial:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)


def check_writable(path: Path) -> None:
    """Make the directories above a result file and try to write there, before the work starts.

    Raises:
        MachineError: The file could not be written.
    """
    with _growing(path, OTHER_OUT) as partial:
        partial.touch()


@contextmanager
def _growing(path: Path, cure: str) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield partial
    except OSError as error:
        reason = f"{path}: cannot be written: {error.strerror or error}"
        raise MachineError(f"{reason}; {cure}" if cure else reason) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any, cure: str = "") -> None:
    """Replace a JSON file in one step; see `replacing` for the arguments and errors."""
    with replacing(path, cure) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file below a directory, and the directory's own entries, to the disk."""
    for path in [path for path in folder.rglob("*") if path.is_file()] + [folder]:
        sync(path)


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, which is read in pieces.

    Raises:
        UserError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while piece := stream.read(_HASHED_AT_ONCE):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def check_out(path: Path) -> None:
    """Refuse a result file that could not be written, before the work starts; nothing is created.

    Raises:
        UserError: The path is a directory, or lies where nothing can be written.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        reason = "is a directory"
    elif not folder.is_dir():
        reason = f"{folder} is not a directory"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{folder} is not writable"
    else:
        return
    raise UserError(f"--out {path}: {reason}; name a file in a directory that can be written to")


def first_of(names: Sequence[str], most: int = 8) -> str:
    """Join the first names for a message, and say how many more there are."""
    rest = f", … {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
