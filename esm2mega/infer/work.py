"""Keeps an unfinished output in a directory beside it, so that any later start can go on with it.

    OUT.partial/
      prepared/       the token store of the input
      manifest.json   what is being computed, and where the arrays lie; written when all places are reserved
      arrays          the arrays; for HDF5 the very file that becomes the output
      done.RANK       finished pieces, one a line, written when their rows are on the disk

A kill at any time leaves pieces that are listed and complete, and others that are computed again. A line of
``done.RANK`` names the rows of its piece and their checksum, and has one of its own: a piece whose rows or
line are no longer what was written is computed again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from esm2mega.config.renamed import current_settings
from esm2mega.errors import MachineError, UserError
from esm2mega.files import OTHER_OUT, json_sha256, read_json, write_json
from esm2mega.infer.arrays import ArrayFile, WrittenRows
from esm2mega.infer.contents import Contents
from esm2mega.infer.target import OutputTarget

_SYNC_SHARE = 20
"""Limits waiting for the disk to one part in this many of the time."""

_MANIFEST, _ARRAYS = "manifest.json", "arrays"
_CHECKSUM = "sha256"
_MOST_THREADS = 8
_AGAIN = "begin again with --overwrite"
_SPARE_BYTES = 1 << 20


def has_begun(target: OutputTarget) -> bool:
    """Return whether an earlier start left something to go on with.

    It did not if the kill came after the very last step, when the file of HDF5 arrays is the output already.
    """
    return all((target.work_dir / name).is_file() for name in (_MANIFEST, _ARRAYS))


@dataclass(frozen=True)
class Work:
    """Manages one growing output, its target and its contents."""

    target: OutputTarget
    contents: Contents

    @property
    def folder(self) -> Path:
        return self.target.work_dir

    @property
    def has_finished(self) -> bool:
        """Tell whether any process has noted a finished piece."""
        return any(path.stat().st_size for path in self.folder.glob("done.*"))

    def begin(self) -> list[int]:
        """Reserve all places, or take over those of an earlier start; one process calls this.

        Returns:
            The pieces that remain to be computed.

        Raises:
            UserError: The earlier start computed something else, or its manifest is damaged.
            MachineError: The disk is too small.
        """
        manifest = self.folder / _MANIFEST
        if manifest.is_file():
            self._check_same(self._begun()["attributes"])
        else:
            (self.folder / _ARRAYS).unlink(missing_ok=True)
            for journal in self.folder.glob("done.*"):
                journal.unlink()
            self._check_space()
            offsets = self.target.create(self.folder / _ARRAYS, self.contents)
            begun = {"attributes": self.contents.attributes, "offsets": offsets}
            write_json(manifest, {**begun, _CHECKSUM: json_sha256(begun)}, OTHER_OUT)
        done = self._finished()
        return [piece for piece in range(self.contents.num_pieces) if piece not in done]

    def _finished(self) -> set[int]:
        """Return the pieces that earlier starts finished, and whose rows are what they wrote."""
        entries: list[_Entry] = []
        unreadable = 0
        for path in sorted(self.folder.glob("done.*")):
            lines = _whole_lines(path)
            found = [entry for line in lines if (entry := _read_entry(line)) is not None]
            unreadable += len(lines) - len(found)
            entries += found
        with self.open_arrays() as arrays, ThreadPoolExecutor(_MOST_THREADS) as pool:
            sums = pool.map(lambda entry: arrays.sha256(entry.rows), entries)
            good = {entry.piece for entry, found in zip(entries, sums, strict=True) if found == entry.sha256}
        again = len({entry.piece for entry in entries} - good)
        if again or unreadable:
            what = [f"{again:,} finished pieces no longer have the bytes that were written"] if again else []
            what += [f"{unreadable:,} lines of done.* are damaged or cut short"] if unreadable else []
            print(f"{self.folder}: {' and '.join(what)}; these pieces are computed again", file=sys.stderr)
        return good

    def open_arrays(self) -> ArrayFile:
        """Open the file of the arrays; any process may do so once `begin` has returned."""
        offsets = self._begun()["offsets"]
        return ArrayFile(self.folder / _ARRAYS, self.contents.specs, offsets)

    def finish(self) -> list[Path]:
        """Give the output its name; one process calls this when all pieces are done."""
        with self.open_arrays() as arrays:
            arrays.sync()
            made = self.target.finish(self.folder / _ARRAYS, self.contents, arrays)
        shutil.rmtree(self.folder)
        return made

    def _begun(self) -> dict[str, Any]:
        """Return what `begin` wrote down."""
        begun = read_json(self.folder / _MANIFEST, _AGAIN)
        # Earlier versions wrote none.
        noted = begun.pop(_CHECKSUM, None)
        if not {"attributes", "offsets"} == begun.keys() or not isinstance(begun["attributes"], dict):
            raise UserError(f"{self.folder / _MANIFEST}: was not written by this command; {_AGAIN}")
        if noted is not None and noted != json_sha256(begun):
            raise UserError(f"{self.folder / _MANIFEST}: is damaged: differs from its checksum; {_AGAIN}")
        return begun

    def _check_same(self, earlier: dict[str, Any]) -> None:
        differences = differing(earlier, self.contents.attributes)
        if differences:
            raise UserError(
                f"{self.folder}: begun with other settings: {differences}; set them back, or {_AGAIN}"
            )

    def _check_space(self) -> None:
        needed = sum(spec.num_bytes for spec in self.contents.specs.values()) + _SPARE_BYTES
        # Other formats than HDF5 are a copy of the arrays, which are removed afterwards.
        needed *= 1 if self.target.format == "hdf5" else 2
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise MachineError(
                f"{self.target.out}: needs {needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB left; "
                f"{self.contents.smaller}choose another --out"
            )


class Journal:
    """Writes down the finished pieces of this process, after their rows are on the disk.

    It does so now and then and not after each piece, since bringing rows to the disk takes time.
    """

    def __init__(self, folder: Path, rank: int, arrays: ArrayFile) -> None:
        """Name the journal of this process, which alone writes it.

        Args:
            folder: Directory of the unfinished output.
            rank: Rank of this process.
            arrays: File of the arrays.
        """
        self._path = folder / f"done.{rank}"
        self._arrays = arrays
        self._waiting: list[tuple[int, WrittenRows]] = []
        self._next = time.monotonic()

    def add(self, piece: int, written: WrittenRows) -> None:
        """Note a piece of which all rows were written, and which they are."""
        self._waiting.append((piece, written))
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Bring all rows and the entries of their pieces to the disk, where they outlast any kill."""
        began = time.monotonic()
        self._arrays.sync()
        entries = [self._entry(piece, written) for piece, written in self._waiting]
        with self._path.open("a") as stream:
            # The line end in front separates this line from one that a kill cut short.
            stream.write("".join(f"\n{_line(entry)}\n" for entry in entries))
            stream.flush()
            os.fsync(stream.fileno())
        self._waiting = []
        now = time.monotonic()
        self._next = now + _SYNC_SHARE * (now - began)

    def _entry(self, piece: int, written: WrittenRows) -> _Entry:
        spans = written.spans()
        found = self._arrays.sha256(spans)
        assert found is not None, piece
        return _Entry(piece, spans, found)


class _Entry(NamedTuple):
    """Is an entry of a journal: a finished piece, the spans of its rows by array, and their SHA-256."""

    piece: int
    rows: dict[str, list[list[int]]]
    sha256: str


def _line(entry: _Entry) -> str:
    """Return the line of an entry, with its own checksum at the end."""
    text = json.dumps(entry, separators=(",", ":"))
    return f"{text} {zlib.crc32(text.encode()):08x}"


def _read_entry(line: str) -> _Entry | None:
    """Return what `_line` wrote; None if the line is anything else."""
    text, _, checksum = line.rpartition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        return None
    return _Entry(*json.loads(text))


def _whole_lines(path: Path) -> list[str]:
    """Return the lines that were written to their end."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines if line]


def differing(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the settings in which two starts differ; the text is empty if they are the same.

    Args:
        earlier: Settings as an earlier start noted them, under the names of its version.
        now: Settings of this start.
    """
    earlier = current_settings(earlier)
    return ", ".join(
        f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
        for name in {**earlier, **now}
        if earlier.get(name) != now.get(name)
    )
