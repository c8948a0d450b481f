"""Compares the files of token stores with the checksums in their manifests, in the foreground or background.

Small files are compared whenever a store is opened. A large file is compared once: that it was found good is
noted, together with what identifies the file (device, inode, size, times), and holds until any of that
changes. Of the large files, arrays say where the others are to be read, and so are compared before a store is
used; tokens and ids may be compared while they are used already.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from esm2mega.data.store.manifest import damaged
from esm2mega.errors import DamagedError, UserError
from esm2mega.files import parse_json, real_path, user_cache, write_json
from esm2mega.processes import yield_processors

SMALL_BYTES = 4 << 20
"""Files of at most this many bytes are compared whenever a store is opened, in some milliseconds each."""

RECORD = ".verified.json"
"""This file of a store says which of its large files were found good."""

_ARRAYS = (".idx", ".npy")
_AT_ONCE = 1 << 20
_SAID_FROM = 1 << 30
"""From this many bytes on, a line says why nothing else happens for the moment."""

_SETTLED_SECONDS = 2.0
"""A file that has changed within this time may change again without another time: some clocks are coarse."""

Identity = list[int]


class Store(Protocol):
    """Says what is needed of a token store."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...


def verify_small(store: Store) -> None:
    """Compare the small files of a store with their checksums.

    Raises:
        DamagedError: A file differs.
    """
    for name, entry in store.manifest["files"].items():
        if entry["bytes"] <= SMALL_BYTES:
            verify_file(store, name)


def verify(stores: Sequence[Store], arrays_only: bool = False) -> None:
    """Compare the large files of stores that have not been found good before; one process calls this.

    Args:
        stores: The stores, which are open.
        arrays_only: Whether to leave tokens and ids out.

    Raises:
        DamagedError: A file differs.
    """
    pending = [(store, name) for store in stores for name in unverified(store, arrays_only)]
    size = sum(store.manifest["files"][name]["bytes"] for store, name in pending)
    if size >= _SAID_FROM:
        names = ", ".join(dict.fromkeys(str(store.path) for store, _ in pending))
        print(f"{names}: {size / 1e9:.1f} GB are compared with their checksums", file=sys.stderr, flush=True)
    for store, name in pending:
        verify_file(store, name)


def unverified(store: Store, arrays_only: bool = False) -> list[str]:
    """Return the names of large files of a store that have not been found good as they are now."""
    known, names = _read_records(store.path), []
    for name, entry in store.manifest["files"].items():
        if entry["bytes"] <= SMALL_BYTES or (arrays_only and not name.endswith(_ARRAYS)):
            continue
        found = {"identity": _identity(os.stat(store.path / name)), "sha256": entry["sha256"]}
        if found not in known.get(name, []):
            names.append(name)
    return names


def verify_file(store: Store, name: str, go_on: Callable[[], bool] = lambda: True) -> None:
    """Compare one file of a store with its checksum, and note it if it is large and good.

    Args:
        store: The store.
        name: Name of the file.
        go_on: Is asked between pieces of the file; nothing comes of it when the answer is no.

    Raises:
        DamagedError: The file differs.
        OSError: It cannot be read, which says nothing about its content.
    """
    begun, file = time.time(), store.path / name
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        identity = _identity(os.fstat(stream.fileno()))
        while piece := stream.read(_AT_ONCE):
            if not go_on():
                return
            digest.update(piece)
        is_same = identity == _identity(os.fstat(stream.fileno()))
    expected = store.manifest["files"][name]
    if digest.hexdigest() != expected["sha256"]:
        raise damaged(file, "differs from its checksum in manifest.json")
    if expected["bytes"] > SMALL_BYTES and is_same and begun - max(identity[-2:]) / 1e9 > _SETTLED_SECONDS:
        _note(store.path, name, {"identity": identity, "sha256": expected["sha256"]})


class BackgroundVerification:
    """Compares the large files of stores in a thread of low priority, while the stores are used already.

    Attributes:
        problem: Error about the first file that differs or cannot be read; None so far.
    """

    def __init__(self, stores: Iterable[Store]) -> None:
        """Begin.

        Args:
            stores: The stores; none on a process that leaves the work to another one.
        """
        self.problem: UserError | OSError | None = None
        self._closed = threading.Event()
        self._pending = [(store, name) for store in stores for name in unverified(store)]
        self._thread = threading.Thread(target=self._run, name="esm2mega-verify", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Return the size of all files that are compared."""
        return sum(store.manifest["files"][name]["bytes"] for store, name in self._pending)

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most so long; return whether all files are compared and good.

        Raises:
            DamagedError: A file differs.
            OSError: A file cannot be read.
        """
        self._thread.join(seconds)
        if self.problem is not None:
            raise self.problem
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop, also within a file."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        yield_processors()
        try:
            for store, name in self._pending:
                verify_file(store, name, lambda: not self._closed.is_set())
        except (DamagedError, OSError) as error:
            self.problem = error


def _identity(status: os.stat_result) -> Identity:
    """Return what changes when a file is replaced or written to; the times are the last two."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _places(store: Path) -> list[Path]:
    """Return the files that may hold the record of a store, the preferred one first."""
    places = [store / RECORD]
    with suppress(UserError):  # a user without a home has one place only
        name = hashlib.sha256(str(real_path(store)).encode()).hexdigest()[:32]
        places.append(user_cache() / "verified" / f"{name}.json")
    return places


def _read_records(store: Path) -> dict[str, list[Any]]:
    """Return what is noted about each file, in all places; a record that cannot be read says nothing."""
    found: dict[str, list[Any]] = {}
    for place in _places(store):
        with suppress(OSError, ValueError, AttributeError):
            for name, record in parse_json(place.read_bytes()).items():
                found.setdefault(name, []).append(record)
    return found


def _note(store: Path, name: str, record: Mapping[str, Any]) -> None:
    """Note that a file was found good, beside it or else in the user's cache, or nowhere."""
    for place in _places(store):
        records: Any = None
        with suppress(OSError, ValueError):
            records = parse_json(place.read_bytes())
        with suppress(OSError, UserError):
            write_json(place, {**(records if isinstance(records, dict) else {}), name: record})
            return
