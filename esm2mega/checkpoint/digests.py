"""Writes the digests of a checkpoint's files beside them, and compares the files with their digests.

``digests.json`` is ``{"algorithm": "sha256", "files": {NAME: {"bytes": n, "sha256": hex}, …}}`` over every
file of the checkpoint but itself, ``COMPLETE`` and ``train_state.json``. ``COMPLETE``, which is written last,
holds the SHA-256 of ``digests.json``; in a checkpoint of an earlier version it is empty. The file
``train_state.json`` may be replaced in a finished checkpoint and therefore carries its own checksum.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from esm2mega.errors import DamagedError, MachineError, UserError
from esm2mega.files import content_sha256, parse_json, shortened, write_json

DIGESTS = "digests.json"
COMPLETE = "COMPLETE"
STATE = "train_state.json"

CURE = "use another checkpoint, or copy this one again from where it came from"
"""This tells the user what to do about a damaged checkpoint."""

NO_DAMAGE = "this says nothing about its content: look at its permissions, and at the file system"
"""This tells the user what to do about a file that could not be read."""

_REMOVED = (
    "its checkpoint was removed meanwhile, perhaps by its run, which keeps checkpoint.keep_last of them; "
    "start this command again"
)

_THREADS = 8
"""At most this many files are read at once; hashing runs outside of Python's global lock."""

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""These errors say that a file is not there; any other error of reading is the machine's."""

_LARGE = ".distcp"
"""Names of the files that hold the numbers of tensors end so; all others are small."""

Entries = dict[str, dict[str, Any]]
"""Maps names of files, relative to the checkpoint, to ``{"bytes": n, "sha256": hex}``."""


def digest_files(folder: Path, names: Sequence[str]) -> Entries:
    """Compute the entries of `digests.json` for files of a checkpoint, in threads and in bounded memory.

    Args:
        folder: Directory of the checkpoint, under whichever name.
        names: Paths of the files relative to it, with ``/``.

    Raises:
        OSError: A file cannot be read.
    """

    def digest(name: str) -> dict[str, Any]:
        path = folder / name
        return {"bytes": path.stat().st_size, "sha256": content_sha256(path)}

    with ThreadPoolExecutor(_num_threads(len(names))) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def tensor_files(folder: Path, rank: int) -> list[str]:
    """Return the names of the files of tensors that a rank wrote into a checkpoint."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.glob(f"*/__{rank}_*{_LARGE}"))


def write_digests(partial: Path, entries: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Digest the files of a checkpoint that have no entry yet; write ``digests.json``, and then ``COMPLETE``.

    This is the last that is written into a checkpoint, whoever writes it.

    Args:
        partial: The directory, in which all other files are.
        entries: Entries of the files that are digested already; None for none.

    Raises:
        OSError: A file cannot be read or written.
    """
    known = entries or {}
    names = (p.relative_to(partial).as_posix() for p in sorted(partial.rglob("*")) if p.is_file())
    rest = [name for name in names if name not in known and name not in (DIGESTS, COMPLETE, STATE)]
    files = {**known, **digest_files(partial, rest)}
    write_json(partial / DIGESTS, {"algorithm": "sha256", "files": dict(sorted(files.items()))})
    (partial / COMPLETE).write_text(content_sha256(partial / DIGESTS) + "\n")


def has_digests(checkpoint: Path) -> bool:
    """Tell whether a complete checkpoint was written with digests; those of earlier versions were not.

    Raises:
        MachineError: The files cannot be read.
    """
    return bool(read_small(checkpoint / COMPLETE)) or (checkpoint / DIGESTS).exists()


def read_digests(checkpoint: Path) -> Entries | None:
    """Return the entries of ``digests.json``, or None for a checkpoint of an earlier version.

    Raises:
        DamagedError: The file does not agree with ``COMPLETE``.
        MachineError: It cannot be read.
    """
    if not has_digests(checkpoint):
        return None
    path = checkpoint / DIGESTS
    content, recorded = read_small(path), read_small(checkpoint / COMPLETE)
    if hashlib.sha256(content).hexdigest().encode() != recorded.strip():
        raise DamagedError(path, f"is damaged, or {COMPLETE} beside it, which names another SHA-256", CURE)
    try:
        files = dict(parse_json(content)["files"])
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(path, f"holds no digests ({error})", CURE) from error
    for name, entry in files.items():
        if not _is_sound(name, entry):
            raise DamagedError(path, f"has an entry {shortened(name)} that no save has written", CURE)
    return files


def _is_sound(name: str, entry: Any) -> bool:
    """Tell whether an entry is of a file in the checkpoint: whoever made it, no other file is opened."""
    return (
        not PurePosixPath(name).is_absolute()
        and not {"..", "\0"} & {*PurePosixPath(name).parts, *name}
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


def read_small(path: Path) -> bytes:
    """Return the content of a small file of a checkpoint.

    Raises:
        DamagedError: It is not there.
        MachineError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def is_large(name: str) -> bool:
    """Tell whether a file of a checkpoint holds the numbers of tensors."""
    return name.endswith(_LARGE)


def verify(
    checkpoint: Path, entries: Mapping[str, Mapping[str, Any]], names: Iterable[str] | None = None
) -> None:
    """Compare files of a checkpoint with their entries: all sizes first, then the contents, in threads.

    Args:
        checkpoint: Directory of the checkpoint.
        entries: From `read_digests`.
        names: The files to compare; None for all.

    Raises:
        DamagedError: A file is missing or differs; its path is the error's `path`.
        MachineError: A file cannot be read, which says nothing about its content.
    """
    names = sorted(entries if names is None else names)
    check_sizes(checkpoint, {name: entries[name] for name in names})

    def check(name: str) -> None:
        path = checkpoint / name
        try:
            found = content_sha256(path)
        except OSError as error:
            raise unreadable(path, error) from error
        if found != entries[name]["sha256"]:
            raise DamagedError(path, f"is damaged: its SHA-256 is not that of {DIGESTS}", CURE)

    with ThreadPoolExecutor(_num_threads(len(names))) as pool:
        pending = [pool.submit(check, name) for name in names]
        try:
            for future in pending:
                future.result()
        finally:
            # What has not begun need not be read once a file is damaged.
            for future in pending:
                future.cancel()


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the error for a file of a checkpoint that was not read: damage only if the file is not there."""
    if isinstance(error, ABSENT):
        if any((folder / COMPLETE).exists() for folder in (path.parent, path.parent.parent)):
            return DamagedError(path, "is missing", CURE)
        return DamagedError(path, "is not there any more", _REMOVED)
    return MachineError(f"{path}: cannot be read: {error.strerror or error}; {NO_DAMAGE}")


def check_sizes(checkpoint: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the sizes of files with their entries, without reading the files.

    Raises:
        DamagedError: A file is missing, or has another size.
        MachineError: A directory cannot be read.
    """
    for name, entry in entries.items():
        _check_size(checkpoint / name, entry["bytes"])


def _check_size(path: Path, recorded: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error
    if size != recorded:
        raise DamagedError(path, f"is damaged: it has {size} bytes, {DIGESTS} says {recorded}", CURE)


def _num_threads(num_files: int) -> int:
    return max(1, min(_THREADS, num_files, os.cpu_count() or 1))
