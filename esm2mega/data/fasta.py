"""Reads FASTA, plain or gzip, record by record, and refuses everything else with one line naming the place.

Rules: a record is a line `>id description` and the lines up to the next one that starts with `>`. The id is
the first word, in UTF-8; the description is not kept. Blank lines, white space inside sequence lines, Windows
line ends and a missing newline at the end are fine. A residue is an ASCII letter or one of `*`, `-`, `.`; any
other character is an error, as is a record without residues: dropping or guessing would silently shift what
belongs to which residue.

Records and letters are cut out by bytes methods on blocks, so the cost per residue is that of C loops. The
readers of other packages know no line numbers, refuse ids outside ASCII or skip lines without a word.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import string
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol, cast

from esm2mega.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK_BYTES = 1 << 20
_WHITE_SPACE = b" \t\r\n\v\f"
_RESIDUE_BYTES = string.ascii_letters.encode() + b"*-."
_NOT_A_RESIDUE = re.compile(rb"[^" + re.escape(_RESIDUE_BYTES + _WHITE_SPACE) + rb"]")
_BLANK_LINES = re.compile(rb"(?:[ \t\r\v\f]*\n)*")
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
        line = 1
        pending = bytearray()  # from the start of a record to the end of what has been read
        started = False
        for block in self._blocks():
            # The last byte seen may be the newline in front of this block's first ">".
            seen = max(0, len(pending) - 1) if started else 0
            pending += block
            if not started:
                line += self._skip_blank_lines(pending)
                started = self._check_start(pending, line)
            cut = pending.rfind(b"\n>", seen)
            if cut < 0 or not started:
                continue
            for text in bytes(pending[1:cut]).split(b"\n>"):
                yield self._parse(text, line)
                line += text.count(b"\n") + 1
            del pending[: cut + 1]
        if not pending.strip(_WHITE_SPACE):
            raise UserError(f"{self.path}: no sequences in the file; give a FASTA file with `>id` records")
        if not started:  # a single unfinished line, too short for the check above
            self._check_start(pending + b"\n", line)
        yield self._parse(bytes(pending[1:]), line)

    def count_headers(self) -> int:
        """Counts the records in a full pass over the file, without looking into them."""
        count = 0
        last = b"\n"
        for block in self._blocks():
            count += (last + block).count(b"\n>")
            last = block[-1:]
        return count

    def _blocks(self) -> Iterator[bytes]:
        """Yields the decompressed content in blocks; sets `sha256` at the end."""
        try:
            with (
                _TrackedFile(self.path, self._progress) as raw,
                io.BufferedReader(raw, _BLOCK_BYTES) as buffered,
            ):
                stream = self._decompressed(buffered)
                block = stream.read(_BLOCK_BYTES).removeprefix(_UTF8_MARK)
                while block:
                    yield block
                    block = stream.read(_BLOCK_BYTES)
                self.sha256 = raw.sha256.hexdigest()
        except EOFError:
            raise UserError(
                f"{self.path}: the gzip data ends early (truncated file); copy or download it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path}: damaged gzip data ({error}); copy or download it again") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None

    def _decompressed(self, buffered: io.BufferedReader[_TrackedFile]) -> BinaryIO:
        magic = buffered.peek(8)
        if magic.startswith(b"\x1f\x8b"):
            return cast(BinaryIO, gzip.GzipFile(fileobj=buffered))
        for prefix, name in _OTHER_COMPRESSION.items():
            if magic.startswith(prefix):
                raise UserError(
                    f"{self.path}: is {name}-compressed; decompress it first (gzip and plain text are read)"
                )
        return cast(BinaryIO, buffered)

    def _skip_blank_lines(self, pending: bytearray) -> int:
        """Removes leading blank lines in place and returns how many there were."""
        blank = _BLANK_LINES.match(pending)
        assert blank is not None  # the pattern matches the empty string
        removed = blank.group()
        del pending[: len(removed)]
        return removed.count(b"\n")

    def _check_start(self, pending: bytearray, line: int) -> bool:
        """True when a record starts here, False when more bytes are needed to tell."""
        if pending.startswith(b">"):
            return True
        if b"\0" in pending:
            raise UserError(f"{self.path}: is a binary file, not FASTA text")
        if b"\n" not in pending and len(pending) < _BLOCK_BYTES:
            return False
        start = bytes(pending[:30]).split(b"\n")[0].decode("utf-8", errors="replace")
        raise UserError(
            f"{self.path}:{line}: not FASTA: a record must start with '>' but this line starts {start!r}"
        )

    def _parse(self, text: bytes, line: int) -> FastaRecord:
        """Parses one record given without its `>`."""
        header, _, body = text.partition(b"\n")
        name = self._parse_id(header, line)
        if body.translate(None, _RESIDUE_BYTES + _WHITE_SPACE):
            self._raise_stray_character(name, body, line)
        residues = body.translate(None, _WHITE_SPACE)
        if not residues:
            raise UserError(
                f"{self.path}:{line}: no sequence under the header of {name!r}; remove or complete the record"
            )
        self.num_records += 1
        return FastaRecord(name, residues, line)

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

    def _raise_stray_character(self, name: str, body: bytes, header_line: int) -> None:
        stray = _NOT_A_RESIDUE.search(body)
        assert stray is not None  # the caller found one
        line = header_line + 1 + body.count(b"\n", 0, stray.start())
        # A character outside ASCII is up to four bytes; show it whole where it is valid UTF-8.
        shown = body[stray.start() : stray.start() + 4].decode("utf-8", errors="replace")[0]
        raise UserError(
            f"{self.path}:{line}: {shown!r} in the sequence of {name!r} is no residue (letters and '*-.' are)"
        )


def total_bytes(paths: Sequence[str | Path]) -> int:
    """The size on disk of all files together: the total for a `ByteProgress`. Missing files count 0."""
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file())
