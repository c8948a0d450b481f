"""Reads FASTA, and refuses anything else with one line that names the place.

Rules: a record is a line `>id description` and the lines up to the next one that starts with `>`. The id is
the first word, in UTF-8; stores do not keep the description. Blank lines, white space inside sequence lines,
Windows line ends and a missing newline at the end are allowed. Any character that is no residue is an error,
as is a record without residues: dropping or guessing would silently shift what belongs to which residue. In
files of labels (`read_entries`) any printable ASCII character is a label.

Biopython's `SimpleFastaParser` does the parsing. It knows no line numbers and drops control characters at
line ends. So the text handle that it reads from counts the lines, for messages that name one, and looks for
characters that are no residues. The parser takes line by line: when it yields a record, the last line it took
is the next header.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from Bio.SeqIO.FastaIO import SimpleFastaParser

from esm2mega.data.readers.base import (
    RESIDUE_BYTES,
    WHITE_SPACE,
    Block,
    ByteProgress,
    Record,
    check_id,
    check_length,
)
from esm2mega.data.readers.text import TextSource
from esm2mega.errors import UserError

_HEAD_BYTES = 1 << 20
_LABEL_BYTES = bytes(range(33, 127))


class FastaEntry(NamedTuple):
    """Holds a record with its whole header: id, the words behind it, the text under it, and its line."""

    id: str
    words: list[str]
    text: str
    line: int


class _CountedLines:
    """Serves the lines of a block to the parser, and watches them.

    Attributes:
        number: number of the last line taken.
        stray: line and text of the first character that is not in `allowed`; None if there was none.
    """

    def __init__(self, block: Block, allowed: bytes) -> None:
        self._lines, self._allowed = io.BytesIO(block.text), allowed + WHITE_SPACE
        self.number = block.line - 1
        self.stray: tuple[int, str] | None = None

    def __iter__(self) -> Iterator[str]:
        """Continue where the last iteration ended: the parser loops to the first header, then loops again."""
        for line in self._lines:
            self.number += 1
            if line[:1] != b">" and (stray := line.translate(None, self._allowed)) and not self.stray:
                # A character outside ASCII is up to four bytes; show it whole where it is valid UTF-8.
                self.stray = self.number, stray[:4].decode("utf-8", errors="replace")[0]
            # Other bytes than ASCII become surrogates, which the parser does not take for white space.
            yield line.decode("ascii", "surrogateescape")


class FastaReader(TextSource):
    """Iterates over the records of one FASTA file."""

    format_name = "FASTA"
    too_long = "a record (does a line that starts with '>' lack?)"

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Look for the first header; raise UserError when there is none."""
        super().__init__(path, progress)
        with self._opened() as stream:
            self._start(stream)

    def records(self, block: Block) -> Iterator[Record]:
        for name, _, residues, line in self._parsed(block):
            yield Record(name, residues, line)

    def described(self, block: Block) -> Iterator[tuple[Record, bytes]]:
        """Yield the records of a block, each with what stands behind its id, white space included."""
        for name, header, residues, line in self._parsed(block):
            yield Record(name, residues, line), header[len(name.encode()) :]

    def entries(self, block: Block, labels: bool = False) -> Iterator[FastaEntry]:
        """Yield the records of a block with their headers.

        Args:
            block: a block of this file.
            labels: whether the file holds labels in the place of residues.
        """
        for name, header, body, line in self._parsed(block, labels):
            yield FastaEntry(name, header.decode("utf-8", "replace").split()[1:], body.decode(), line)

    def _parsed(self, block: Block, labels: bool = False) -> Iterator[tuple[str, bytes, bytes, int]]:
        """Yield id, header, body and line of each record."""
        lines, line = _CountedLines(block, _LABEL_BYTES if labels else RESIDUE_BYTES), block.line
        of, what = ("labels", "label") if labels else ("sequence", "residue (letters and '*-.' are)")
        for title, text in SimpleFastaParser(lines):
            # The parser strips the end of the title; a carriage return that is left hides residues in it.
            if "\r" in title:
                raise UserError(
                    f"{self.location(line)}: a carriage return without a line feed in a header; convert the "
                    "line ends, for example with `tr '\\r' '\\n'`"
                )
            header = title.encode("ascii", "surrogateescape")
            name = self._parse_id(header, line)
            if lines.stray:
                stray_line, shown = lines.stray
                raise UserError(
                    f"{self.location(stray_line)}: {shown!r} in the {of} of {name!r} is no {what}"
                )
            body = text.encode().translate(None, WHITE_SPACE)
            check_length(len(body), self.location(line), name)
            if not body:
                raise UserError(
                    f"{self.location(line)}: no {of} under the header of {name!r}; remove or complete the "
                    "record"
                )
            yield name, header, body, line
            line = lines.number

    def _start(self, stream: io.BufferedReader[Any]) -> tuple[bytes, int]:
        """Skip blank lines and return the first header."""
        line = 1
        while (start := stream.readline(_HEAD_BYTES)).isspace():
            line += start.endswith(b"\n")
        if not start:
            raise UserError(f"{self.path}: no sequences in the file; give a FASTA file with `>id` records")
        if start.startswith(b">"):
            return start, line
        if b"\0" in start + stream.peek():
            raise UserError(f"{self.path}: is a binary file, not FASTA text")
        shown = start[:30].removesuffix(b"\n").decode("utf-8", errors="replace")
        raise UserError(
            f"{self.location(line)}: not FASTA: a record must start with '>' but this line starts {shown!r}"
        )

    def _last_cut(self, text: bytes) -> int:
        return text.rfind(b"\n>") + 1

    def _parse_id(self, header: bytes, line: int) -> str:
        words = header.split(None, 1)
        if not words or header[:1].isspace():
            raise UserError(f"{self.location(line)}: the header has no id; write it right after the '>'")
        try:
            name = words[0].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{self.location(line)}: the id {words[0][:60]!r} is not UTF-8; convert the file"
            ) from None
        return check_id(self, line, name)


def read_entries(path: str | Path, labels: bool = False) -> tuple[dict[str, FastaEntry], FastaReader]:
    """Read all records of a file by id; return them and the reader, which knows locations and checksum.

    Args:
        path: FASTA file, also compressed.
        labels: Whether it holds labels in the place of residues.

    Raises:
        UserError: The file is not FASTA, or an id occurs twice.
    """
    reader = FastaReader(path)
    found: dict[str, FastaEntry] = {}
    for block in reader.blocks():
        for entry in reader.entries(block, labels):
            if (first := found.setdefault(entry.id, entry)) is not entry:
                raise UserError(
                    f"{reader.location(entry.line)}: the id {entry.id!r} is that of line {first.line} "
                    "already; remove one of them"
                )
    return found, reader


def attributes(entry: FastaEntry, location: str) -> dict[str, str]:
    """Return the ``KEY=VALUE`` words of a header; a value is everything up to the next white space.

    Raises:
        UserError: A key occurs twice, or a value is not UTF-8.
    """
    found: dict[str, str] = {}
    for word in entry.words:
        key, equals, value = word.partition("=")
        if equals and "\ufffd" in word:  # stands for bytes that are no text; different labels would be one
            raise UserError(
                f"{location}: {word!r} in the header of {entry.id!r} is not UTF-8; convert the file"
            )
        if equals and key in found:
            raise UserError(f"{location}: the header of {entry.id!r} has {key} twice; remove one of them")
        if equals:
            found[key] = value
    return found


def check_blanks(entry: FastaEntry, keys: Container[str], location: str) -> None:
    """Refuse a value with blanks under one of `keys`, of which `attributes` would return the first word only.

    Raises:
        UserError: A word that is no ``KEY=VALUE`` follows the value of one of `keys`.
    """
    for word, after in pairwise(entry.words):
        if word.partition("=")[0] in keys and "=" not in after:
            raise UserError(
                f"{location}: {after!r} after {word!r} in the header of {entry.id!r}: a value ends at white "
                "space; write _ for blanks"
            )
