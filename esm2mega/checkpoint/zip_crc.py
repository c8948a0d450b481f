"""Compares the entries of ZIP archives with their CRCs, which PyTorch's own readers do not."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_READ_AT_ONCE = 1 << 20


class Piece(io.BufferedIOBase):
    """Reads a part of an open file as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        """Begin at its first byte.

        Args:
            file: The open file, whose own place is not changed.
            offset: Byte of the file at which the part begins.
            length: Its bytes.
        """
        self._descriptor, self._offset, self._length = file.fileno(), offset, length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"negative place {start + offset}")
        self._place = start + offset
        return self._place

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._length - self._place)
        size = left if size is None or size < 0 else min(size, left)
        found = os.pread(self._descriptor, size, self._offset + self._place)
        self._place += len(found)
        return found


def is_zip(file: Path | Piece) -> bool:
    """Tell whether a file, by its path or open, ends as a ZIP archive does, be it whole or not."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # it ends as one that is cut into several files, or is damaged there
        return True


def check_crcs(file: Path | Piece, entries: Sequence[zipfile.ZipInfo] | None = None) -> None:
    """Read every entry of an archive in pieces.

    Args:
        file: The archive, by its path or open.
        entries: Its entries, if they are known already.

    Raises:
        ValueError: An entry is not what was written; the text names it.
        OSError: The archive cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist() if entries is None else entries
            if not any(entry.CRC for entry in entries):
                return  # torch.serialization.set_crc32_options(False) writes zeros
            for entry in entries:
                try:
                    with archive.open(entry) as stream:
                        while stream.read(_READ_AT_ONCE):
                            pass
                except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as error:
                    raise ValueError(
                        f"its entry {entry.filename!r} is not what was written ({error})"
                    ) from error
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ValueError(f"it is not a whole ZIP archive ({error})") from error
