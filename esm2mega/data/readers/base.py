"""Defines what every reader offers: records, in blocks that any process can read on its own.

A source cuts its input into blocks in one sequential pass; any process can then read the records of a block.
Blocks follow from the input alone, so the result does not depend on how many processes share the work. A
residue is an ASCII letter or one of `*`, `-`, `.`, in every format.
"""

from __future__ import annotations

import copy
import hashlib
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from esm2mega import vocabulary
from esm2mega.errors import UserError
from esm2mega.files import file_sha256, first_of, refuse_stream

WHITE_SPACE = b" \t\r\n"
"""Blanks, tabs and ends of lines stand in sequences that are wrapped or in groups, and mean nothing there."""

RESIDUE_BYTES = string.ascii_letters.encode() + b"*-."

LONGEST_SEQUENCE = 16 << 20
"""A protein has at most so many residues, in every format; the longest that is known has some 45 thousand."""

LONGEST_TEXT = 2 * LONGEST_SEQUENCE
"""A record, or the row of a table, may take this many bytes, and is refused as soon as it is longer."""

MISSING_VALUES = frozenset({"nan", "NaN", "NA", "N/A", "<NA>", "#N/A", "null", "None"})
"""Other programs write these into cells without a value; some of them would pass as residues."""


class ByteProgress(Protocol):
    """Receives the progress of reading, in bytes of the input files as they lie on disk."""

    def update(self, n: int) -> object:
        """Report that another `n` bytes have been read."""


class Record(NamedTuple):
    """Holds one protein: its id, its residues without white space, and its line (or row, or item) from 1.

    A record without residues is to be dropped, as the user asked, and only counted.
    """

    id: str
    residues: bytes
    line: int


@dataclass(frozen=True)
class Block:
    """Holds a stretch of a source: text of whole records, or the rows from `line` to `stop`, exclusive."""

    line: int
    text: bytes = b""
    stop: int = 0


@dataclass(frozen=True)
class SourceOptions:
    """Says how inputs are read.

    Attributes:
        format: one of `sources.FORMATS`, or None to go by the name of the file.
        sequence_column: column, or key, that holds the residues.
        id_column: column that holds the ids; None for `id` where there is one and else the line number.
        drop_empty: leave rows without a sequence out and count them, instead of refusing the file.
        wild_type: protein of which `sequence_column` holds variants, such as ``A24G``, in place of sequences;
            None where it holds sequences.
        first_residue: number that the variants give to the first residue of this protein.
        sequences_beside: column of sequences of a table without the column of variants.
        set_by: how the user sets these in the command at hand: by its options, by the keys of the section
            ``data``, or not at all. It decides the cures in messages, and nothing about what is read.
    """

    format: str | None = None
    sequence_column: str = "sequence"
    id_column: str | None = None
    drop_empty: bool = False
    # Not in the text that names a cache, which readers add it to: names without it are as they always were.
    wild_type: str | None = field(default=None, repr=False)
    first_residue: int = field(default=1, repr=False)
    sequences_beside: str | None = field(default=None, repr=False)
    # Not in the text that names a cache: what is read does not depend on it.
    set_by: Literal["options", "keys", "nothing"] = field(default="options", repr=False, compare=False)

    @property
    def of_variants(self) -> str:
        """Return, as text, what decides which sequences variants stand for; empty for tables of sequences."""
        if self.wild_type is None:
            return ""
        return self.wild_type if self.first_residue == 1 else f"{self.wild_type} from {self.first_residue}"

    def setting(self, name: str, value: str) -> str | None:
        """Return what the user writes to give one of the columns another name; None if nothing does."""
        if self.set_by == "nothing":
            return None
        if name == "sequence_column" and self.wild_type is not None:
            name = "mutation_column"
        return f"--{name.replace('_', '-')} {value}" if self.set_by == "options" else f"data.{name}={value}"


class RecordSource(ABC):
    """Reads one input: a file, or several files of one name that belong together.

    Attributes:
        path: the path as the user gave it.
        checksums: SHA-256 of the bytes on disk by file name; complete when `blocks` is exhausted.
        num_records: records that iterating over the source has yielded.
    """

    unit = ":"
    """Messages put this between the path and a line or row number."""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Name the input; nothing is read.

        Args:
            path: the file.
            progress: told about bytes of the files as they are read.
        """
        self.path = Path(path)
        self.progress = progress
        self.checksums: dict[str, str] = {}
        self.num_records = 0

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Cut the input into blocks, in order; raise UserError where it is not of this format."""

    @abstractmethod
    def records(self, block: Block) -> Iterator[Record]:
        """Yield the records of a block in order; raise UserError with the location of the first bad one."""

    def files(self) -> list[Path]:
        """Return the files that decide the content, in the order of `checksums`."""
        return [self.path]

    def notes(self) -> list[str]:
        """Return what the user should know about how this input was read."""
        return []

    def __iter__(self) -> Iterator[Record]:
        """Yield all records in order."""
        for block in self.blocks():
            for record in self.records(block):
                self.num_records += 1
                yield record

    def location(self, line: int) -> str:
        """Say where a record stands, for messages."""
        return f"{self.path}{self.unit}{line}"

    def key(self, block: Block) -> str:
        """Return a hash that is equal for two blocks from which the same records are read."""
        content = block.text or f"{sorted(self.checksums.items())} {block.stop}".encode()
        reading = f"{type(self).__name__} {self._reading()} {block.line} {vocabulary.TOKENIZER_HASH} "
        return hashlib.sha256(reading.encode() + hashlib.sha256(content).digest()).hexdigest()

    def for_worker(self) -> RecordSource:
        """Return a copy that can be sent to another process to read blocks there."""
        worker = copy.copy(self)
        worker.progress = None
        return worker

    def _reading(self) -> str:
        """Return, as text, the options that decide what is read from a given block."""
        return ""

    def _check_file(self, path: Path, what: str) -> None:
        """Raise UserError unless `path` is a file; `what` names its format."""
        refuse_stream(path)
        if path.is_dir():
            raise UserError(f"{path}: is a directory, not a {what} file; name the files in it")
        if not path.exists():
            raise UserError(f"{path}: no such {what} file")


class RowSource(RecordSource):
    """Reads a binary file with numbered rows, which is hashed first and then cut by row numbers."""

    unit = ": row "

    def blocks(self) -> Iterator[Block]:
        self.checksums = {self._name_of(file): file_sha256(file) for file in self.files()}
        total = sum(file.stat().st_size for file in self.files())
        reported = 0
        ranges = self._ranges()
        for first, stop in ranges:
            yield Block(first + 1, stop=stop + 1)
            if self.progress is not None:
                done = total * stop // ranges[-1][1]
                self.progress.update(done - reported)
                reported = done

    def _name_of(self, file: Path) -> str:
        """Return the name of one of `files` in `checksums`, where no two are the same."""
        return file.name

    @abstractmethod
    def _ranges(self) -> Sequence[tuple[int, int]]:
        """Return the rows of each block, counted from 0, end exclusive; at least one block."""


def check_id(source: RecordSource, line: int, name: str) -> str:
    """Return the id, or raise UserError if it holds unprintable characters."""
    if not name.isprintable():
        raise UserError(f"{source.location(line)}: the id {name[:60]!r} holds unprintable characters")
    return name


def residues_of(sequence: str, location: str, name: str) -> bytes:
    """Return the residues of a cell, without white space; raise UserError at a character that is none."""
    check_length(len(sequence), location, name)
    residues = sequence.encode("utf-8", "surrogatepass").translate(None, WHITE_SPACE)
    if stray := residues.translate(None, RESIDUE_BYTES):
        shown = stray[:4].decode("utf-8", errors="replace")[0]
        raise UserError(
            f"{location}: {shown!r} in the sequence of {name!r} is no residue (letters and '*-.' are)"
        )
    return residues


def check_length(length: int, location: str, name: str) -> None:
    """Refuse a sequence of more than `LONGEST_SEQUENCE` residues before it is taken apart."""
    if length > LONGEST_SEQUENCE:
        raise UserError(
            f"{location}: the sequence of {name!r} has {length:,} residues, the limit is "
            f"{LONGEST_SEQUENCE:,}; remove or cut the record"
        )


def require_columns(
    location: str, available: Sequence[str], required: Iterable[str], cure: str, what: str = "column"
) -> None:
    """Refuse a table in which a required column is missing or occurs twice.

    Args:
        location: Where the table is, for messages.
        available: Names of its columns.
        required: Names of the columns that must be there.
        cure: What the user can do about a missing column.
        what: Word of the format for a column.
    """
    for name in required:
        if (count := available.count(name)) > 1:
            raise UserError(f"{location}: has {count} {what}s {name!r}; rename all but one")
        if not count:
            raise UserError(f"{location}: no {what} {name!r} among {first_of(available, 12)}; {cure}")
