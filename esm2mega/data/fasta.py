"""Reads FASTA, plain, gzip or zstd, and refuses everything else with one line naming the place.

Rules: a record is a line `>id description` and the lines up to the next one that starts with `>`. The id is
the first word, in UTF-8; the description is not kept. Blank lines, white space inside sequence lines, Windows
line ends and a missing newline at the end are fine. Any character that is no residue is an error, as is a
record without residues: dropping or guessing would silently shift what belongs to which residue.

Biopython's `SimpleFastaParser` does the parsing. It knows no line numbers and drops control characters at
line ends. So the text handle it reads counts the lines, for messages that name one, and looks for characters
that are no residues. The parser takes line by line: when it yields a record, the last line it took is the
next header.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from Bio.SeqIO.FastaIO import SimpleFastaParser

from esm2mega.data.records import RESIDUE_BYTES, WHITE_SPACE, Block, Record, check_id
from esm2mega.data.text import TextSource
from esm2mega.errors import UserError

_HEAD_BYTES = 1 << 20
_SEQUENCE_BYTES = RESIDUE_BYTES + WHITE_SPACE


class _CountedLines:
    """The parser's text handle: `number` of the last line taken; `stray`: line and first non-residue."""

    def __init__(self, block: Block) -> None:
        self._lines = io.BytesIO(block.text)
        self.number = block.line - 1
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


class FastaReader(TextSource):
    """Iterates over the records of one FASTA file."""

    format_name = "FASTA"

    def records(self, block: Block) -> Iterator[Record]:
        lines, line = _CountedLines(block), block.line
        for title, sequence in SimpleFastaParser(lines):
            name = self._parse_id(title.encode("ascii", "surrogateescape"), line)
            if lines.stray:
                place, shown = lines.stray
                raise UserError(
                    f"{self.place(place)}: {shown!r} in the sequence of {name!r} is no residue "
                    "(letters and '*-.' are)"
                )
            residues = sequence.encode().translate(None, WHITE_SPACE)
            if not residues:
                raise UserError(
                    f"{self.place(line)}: no sequence under the header of {name!r}; "
                    "remove or complete the record"
                )
            yield Record(name, residues, line)
            line = lines.number

    def _start(self, stream: io.BufferedReader[Any]) -> tuple[bytes, int]:
        """Skips blank lines."""
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
            f"{self.place(line)}: not FASTA: a record must start with '>' but this line starts {shown!r}"
        )

    def _last_cut(self, text: bytes) -> int:
        return text.rfind(b"\n>") + 1

    def _parse_id(self, header: bytes, line: int) -> str:
        words = header.split(None, 1)
        if not words or header[:1].isspace():
            raise UserError(f"{self.place(line)}: the header has no id; write it right behind the '>'")
        try:
            name = words[0].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{self.place(line)}: the id {words[0][:60]!r} is not UTF-8; convert the file"
            ) from None
        return check_id(self, line, name)
