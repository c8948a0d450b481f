"""Compares the entries of ZIP archives with their CRCs, which PyTorch's own readers do not."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_READ_AT_ONCE = 1 << 20


def check_crcs(file: Path | IO[bytes], entries: Sequence[zipfile.ZipInfo] | None = None) -> None:
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
