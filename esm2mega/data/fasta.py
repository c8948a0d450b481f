"""Reads FASTA, plain or gzip, record by record, and refuses everything else with one line naming the place.

Rules: a record is a line `>id description` and the lines up to the next one that starts with `>`. The id is
the first word, in UTF-8; the description is not kept. Blank lines, white space inside sequence lines, Windows
line ends and a missing newline at the end are fine. A residue is an ASCII letter or one of `*`, `-`, `.`; any
other character is an error, as is a record without residues: dropping or guessing would silently shift what
belongs to which residue.

Biopython's `SimpleFastaParser` does the parsing. It knows no line numbers, skips text in front of the first
record and drops control characters at line ends. So the text handle it reads counts the lines, for messages
that name one, and looks for characters that are no residues. The parser takes line by line: when it yields a
record, the last line it took is the next header.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import string
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from Bio.SeqIO.FastaIO import SimpleFastaParser

from esm2mega.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK_BYTES = 1 << 20
_WHITE_SPACE = b" \t\r\n\v\f"
_SEQUENCE_BYTES = string.ascii_letters.encode() + b"*-." + _WHITE_SPACE
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}


class ByteProgress(Protocol):
    """Receives how far reading has come; the unit is bytes of the input files as they lie on disk."""

    def update(self, n: int) -> object:
        """Another `n` bytes have been read."""


class FastaRecord(NamedTuple):
    """One protein: its id, its residues without white space, and the line (from 1) of its header."""

    id: str
    residues: bytes
    line: int


class _TrackedFile(io.FileIO):
    """A file opened for reading that hashes and reports every byte passing through."""

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


class _CountedLines:
    """The parser's text handle: `number` of the last line taken; `stray`: line and first non-residue."""

    def __init__(self, header: bytes, number: int, stream: Iterable[bytes]) -> None:
        self._lines = chain([header], stream)
        self.number = number - 1
        self.stray: tuple[int, str] | None = None

    def __iter__(self) -> Iterator[str]:
        """Goes on where the last iteration ended: the parser loops to the first header, then again."""
        for line in self._lines:
            self.number += 1
            if line[:1] != b">" and (stray := line.translate(None, _SEQUENCE_BYTES)) and not self.stray:
                # A character outside ASCII is up to four bytes; show it whole where it is valid UTF-8.
                self.stray = self.number, stray[:4].decode("utf-8", errors="replace")[0]
            # Other bytes than ASCII become surrogates, which the parser does not take for white space.
            yield line.decode("ascii", "surrogateescape")


class FastaReader:
    """Iterates over the records of one FASTA file; `sha256` and `num_records` are known afterwards."""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Checks that the file can be read.

        Args:
            path: FASTA file; gzip is recognised by its content, not by its name.
            progress: told about every block read from disk.
        """
        self.path = Path(path)
        self.sha256 = ""
        self.num_records = 0
        self._progress = progress
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a directory, not a FASTA file; name the files in it")
        if not self.path.exists():
            raise UserError(f"{self.path}: no such FASTA file")
        if not self.path.is_file():  # a pipe could not be read a second time for counting
            raise UserError(f"{self.path}: is not a regular file; write the FASTA text to a file first")

    def __iter__(self) -> Iterator[FastaRecord]:
        """Yields the records in file order; raises UserError at the first thing that is not FASTA."""
        with self._opened() as stream:
            header, line = self._first_header(stream)
            lines = _CountedLines(header, line, stream)
            for title, sequence in SimpleFastaParser(lines):
                name = self._parse_id(title.encode("ascii", "surrogateescape"), line)
                if lines.stray:
                    place, shown = lines.stray
                    raise UserError(
                        f"{self.path}:{place}: {shown!r} in the sequence of {name!r} is no residue "
                        "(letters and '*-.' are)"
                    )
                residues = sequence.encode().translate(None, _WHITE_SPACE)
                if not residues:
                    raise UserError(
                        f"{self.path}:{line}: no sequence under the header of {name!r}; "
                        "remove or complete the record"
                    )
                self.num_records += 1
                yield FastaRecord(name, residues, line)
                line = lines.number

    def place(self, line: int) -> str:
        """Where a record stands, for messages."""
        return f"{self.path}:{line}"

    def count_headers(self) -> int:
        """Counts the records in a full pass over the file, without looking into them."""
        count = 0
        last = b"\n"
        with self._opened() as stream:
            while block := stream.read(_BLOCK_BYTES):
                count += (last + block).count(b"\n>")
                last = block[-1:]
        return count

    @contextmanager
    def _opened(self) -> Iterator[io.BufferedReader[Any]]:
        """The decompressed content behind any byte order mark; sets `sha256` once it was read to the end."""
        try:
            with (
                _TrackedFile(self.path, self._progress) as raw,
                io.BufferedReader(raw, _BLOCK_BYTES) as buffered,
            ):
                stream = self._decompressed(buffered)
                if stream.peek(3).startswith(_UTF8_MARK):
                    stream.read(3)
                yield stream
                self.sha256 = raw.sha256.hexdigest()
        except EOFError:
            raise UserError(
                f"{self.path}: the gzip data ends early (truncated file); copy or download it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path}: damaged gzip data ({error}); copy or download it again") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None

    def _decompressed(self, buffered: io.BufferedReader[Any]) -> io.BufferedReader[Any]:
        magic = buffered.peek(8)
        if magic.startswith(b"\x1f\x8b"):
            return io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BLOCK_BYTES)
        for prefix, name in _OTHER_COMPRESSION.items():
            if magic.startswith(prefix):
                raise UserError(
                    f"{self.path}: is {name}-compressed; decompress it first (gzip and plain text are read)"
                )
        return buffered

    def _first_header(self, stream: io.BufferedReader[Any]) -> tuple[bytes, int]:
        """Skips blank lines; returns the first header and its line number."""
        line = 1
        while (start := stream.readline(_BLOCK_BYTES)).isspace():
            line += start.endswith(b"\n")
        if not start:
            raise UserError(f"{self.path}: no sequences in the file; give a FASTA file with `>id` records")
        if start.startswith(b">"):
            return start if start.endswith(b"\n") else start + stream.readline(), line
        if b"\0" in start + stream.peek():
            raise UserError(f"{self.path}: is a binary file, not FASTA text")
        shown = start[:30].removesuffix(b"\n").decode("utf-8", errors="replace")
        raise UserError(
            f"{self.path}:{line}: not FASTA: a record must start with '>' but this line starts {shown!r}"
        )

    def _parse_id(self, header: bytes, line: int) -> str:
        words = header.split(None, 1)
        if not words or header[:1].isspace():
            raise UserError(f"{self.path}:{line}: the header has no id; write it right behind the '>'")
        try:
            name = words[0].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{self.path}:{line}: the id {words[0][:60]!r} is not UTF-8; convert the file"
            ) from None
        if not name.isprintable():
            raise UserError(
                f"{self.path}:{line}: the id {name[:60]!r} holds unprintable characters; is this FASTA?"
            )
        return name


def total_bytes(paths: Sequence[str | Path]) -> int:
    """The size on disk of all files together: the total for a `ByteProgress`. Missing files count 0."""
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file())
