"""Reads text inputs, plain or compressed, once from front to back, and cuts them into blocks."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm2mega.data.readers.base import LONGEST_TEXT, Block, ByteProgress, RecordSource
from esm2mega.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 16 << 20
"""A block holds this much text. In memory are one block per worker, and some more that wait for one."""

_BUFFER_BYTES = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}

# Files made with `zstd --long=31` need a window of 2 GiB; the library's own limit is 128 MiB.
_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}


class _TrackedFile(io.FileIO):
    """Reads a file, and hashes and reports every byte on the way."""

    def __init__(self, path: Path, progress: ByteProgress | None) -> None:
        super().__init__(path, "rb")
        self._progress = progress
        self.sha256 = hashlib.sha256()

    def readinto(self, buffer: Buffer) -> int:
        count = super().readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        if self._progress is not None and count:
            self._progress.update(count)
        return count


class TextSource(RecordSource):
    """Reads a text file whose records follow each other; a subclass says where it may be cut."""

    format_name = "text"
    too_long = "a record"
    """What may not be longer than `LONGEST_TEXT`, with a likely reason, for the message."""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Check that the file exists.

        Args:
            path: the file; gzip and zstd are recognised by content, not by name.
            progress: told about every block read from disk.
        """
        super().__init__(path, progress)
        self._check_file(self.path, self.format_name)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the file as it lies on disk; empty until `blocks` is exhausted."""
        return self.checksums.get(self.path.name, "")

    def blocks(self) -> Iterator[Block]:
        with self._opened(whole=True) as stream:
            pending, line = self._start(stream)
            while text := stream.read(BLOCK_BYTES):
                pending += text
                if len(text) < BLOCK_BYTES:
                    break  # the last record needs no block of its own
                if end := self._last_cut(pending):
                    yield Block(line, pending[:end])
                    line += pending.count(b"\n", 0, end)
                    pending = pending[end:]
                elif len(pending) > LONGEST_TEXT:
                    raise self._too_long(line)
            if pending:
                yield Block(line, pending)

    def decoded(self, block: Block) -> str:
        """Decode the text of a block, or raise UserError if it is not UTF-8."""
        try:
            return block.text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = block.line + block.text.count(b"\n", 0, error.start)
            raise UserError(
                f"{self.location(line)}: is not UTF-8; convert the file, e.g. with iconv"
            ) from None

    def _too_long(self, line: int) -> UserError:
        return UserError(f"{self.location(line)}: {self.too_long} has more than {LONGEST_TEXT >> 20} MiB")

    @abstractmethod
    def _start(self, stream: io.BufferedReader[Any]) -> tuple[bytes, int]:
        """Read to the first record; return what was read of it, and the number of its line.

        Raises:
            UserError: There is no record, or the file is of another format.
        """

    @abstractmethod
    def _last_cut(self, text: bytes) -> int:
        """Return the last position in `text`, a run of records, where another one begins; 0 for none."""

    @contextmanager
    def _opened(self, whole: bool = False) -> Iterator[io.BufferedReader[Any]]:
        """Open the decompressed content behind any byte order mark.

        Args:
            whole: whether the content is read to its end, with progress and the checksum kept.
        """
        with _decompressed(self.path, self.progress if whole else None) as (stream, raw):
            yield stream
        if whole:
            self.checksums = {self.path.name: raw.sha256.hexdigest()}


@contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """Open a text file, plain or compressed with gzip or zstd, behind any byte order mark.

    Raises:
        UserError: The file cannot be read, is compressed in another way, or turns out, anywhere in the block,
            to be damaged.
    """
    with _decompressed(path, None) as (stream, _):
        yield stream


def bounded_lines(path: Path, stream: io.TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a text, none of more than `LONGEST_TEXT` characters.

    Raises:
        UserError: There is a longer one.
    """
    number = 0
    while line := stream.readline(LONGEST_TEXT):
        number += 1
        if len(line) == LONGEST_TEXT:
            raise UserError(
                f"{path}:{number}: a line has more than {LONGEST_TEXT >> 20} MiB; correct the file"
            )
        yield line


@contextmanager
def _decompressed(
    path: Path, progress: ByteProgress | None
) -> Iterator[tuple[io.BufferedReader[Any], _TrackedFile]]:
    """Yield the decompressed content of a file, and the file itself, which hashes what is read of it."""
    kind = "gzip"
    try:
        with _TrackedFile(path, progress) as raw, io.BufferedReader(raw, _BUFFER_BYTES) as buffered:
            magic = buffered.peek(8)[:8]
            stream: io.BufferedReader[Any] = buffered
            if magic.startswith(_GZIP):
                stream = io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BUFFER_BYTES)
            elif magic.startswith(_ZSTD):
                kind = "zstd"
                stream = io.BufferedReader(zstd.ZstdFile(buffered, options=_ZSTD_OPTIONS), _BUFFER_BYTES)
            _refuse_compression(path, magic)
            if stream.peek(3).startswith(_UTF8_MARK):
                stream.read(3)
            yield stream, raw
    except EOFError:
        raise UserError(
            f"{path}: the {kind} data ends early (truncated file); copy or download it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{path}: damaged {kind} data ({error}); copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _refuse_compression(path: Path, magic: bytes) -> None:
    for prefix, name in _OTHER_COMPRESSION.items():
        if magic.startswith(prefix):
            raise UserError(
                f"{path}: is {name}-compressed; decompress it first (gzip, zstd and plain text are read)"
            )
