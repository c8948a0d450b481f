"""Reads which UniRef90 ids belong to which UniRef50 cluster from the mapping file of ESM-2 training.

The first line is a header and is skipped, whatever it says. Every other line is tab-separated: the cluster
id, the ids of its members, and columns that are ignored. Members are separated by `; ` where that occurs in
their column, else by `,`; blanks around an id are no part of it, since no FASTA id holds any. Blank lines are
skipped, and a separator behind the last member is allowed. Ids are compared as they are: nothing is cut off.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from esm2mega.data.readers.base import LONGEST_TEXT, Block, ByteProgress, Record
from esm2mega.data.readers.text import TextSource
from esm2mega.data.store.intake import Located, in_batches
from esm2mega.errors import UserError

_BATCH_MEMBERS = 1 << 16


class ClusterRow(NamedTuple):
    """Holds one cluster: its id, the ids of its members, at least one, and its line (or row, from 1)."""

    id: bytes
    members: list[bytes]
    line: int


Item = TypeVar("Item", covariant=True)


class Protein(Protocol):
    """Has an id, residues without white space, and a line."""

    @property
    def id(self) -> str: ...
    @property
    def residues(self) -> bytes: ...
    @property
    def line(self) -> int: ...


class ItemSource(Located, Protocol[Item]):
    """Reads an input file whose items stand in numbered lines or rows, as often as it is iterated over.

    Attributes:
        path: path of the file.
        sha256: SHA-256 of the file as it lies on disk, known once it was read to the end.
    """

    path: Path

    @property
    def sha256(self) -> str: ...

    def __iter__(self) -> Iterator[Item]:
        """Yield the items in order; raise UserError at the first bad one."""


ClusterSource = ItemSource[ClusterRow]
ProteinSource = ItemSource[Record]


class MappingReader(TextSource):
    """Iterates over the clusters of one mapping file, which may be compressed in the same ways as FASTA."""

    format_name = "mapping"

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Check that the file exists.

        Args:
            path: the mapping file.
            progress: told about every block read from disk.
        """
        super().__init__(path, progress)
        self.header_id = b""
        """The first column of the header, known after reading, is a cluster's id if the header is missing."""

    def __iter__(self) -> Iterator[ClusterRow]:  # type: ignore[override]
        """Yield the clusters in file order; raise UserError at the first line that holds none."""
        self.num_records = 0
        yield from super().__iter__()  # type: ignore[misc]
        if not self.num_records:
            raise UserError(
                f"{self.path}: no clusters in the file; give a header line and, in each further line, a "
                "UniRef50 id, a tab, and the UniRef90 ids of its members"
            )

    def records(self, block: Block) -> Iterator[ClusterRow]:  # type: ignore[override]
        for line, text in enumerate(io.BytesIO(block.text), block.line):
            if not text.isspace():
                yield self._parse(text, line)

    def _start(self, stream: io.BufferedReader[Any]) -> tuple[bytes, int]:
        """Skip the header."""
        header = stream.readline(LONGEST_TEXT)
        if len(header) == LONGEST_TEXT:
            raise self._too_long(1)
        self.header_id = header.partition(b"\t")[0].strip()
        return b"", 2

    def _last_cut(self, text: bytes) -> int:
        return text.rfind(b"\n") + 1

    def _parse(self, text: bytes, line: int) -> ClusterRow:
        columns = text.split(b"\t", 2)
        name = columns[0].strip()
        if not name:
            raise UserError(f"{self.location(line)}: the cluster has no id; the first column must hold it")
        if len(columns) < 2:
            raise UserError(
                f"{self.location(line)}: {shown(name)} is not followed by a tab, which separates columns"
            )
        members = [member.strip() for member in columns[1].split(b"; " if b"; " in columns[1] else b",")]
        members[-1] = members[-1].removesuffix(b";")
        if len(members) > 1 and not members[-1]:
            members.pop()
        if members == [b""]:
            raise UserError(f"{self.location(line)}: cluster {shown(name)} has no members; remove the line")
        if b"" in members:
            raise UserError(
                f"{self.location(line)}: cluster {shown(name)} has an empty member id between two separators"
            )
        return ClusterRow(name, members, line)


def shown(name: bytes) -> str:
    """Quote an id for messages, at most 80 characters of it."""
    return repr(name.decode("utf-8", errors="replace")[:80])


def batched(rows: Iterable[ClusterRow]) -> Iterator[list[ClusterRow]]:
    """Yield clusters in lists of some 65,000 members in all."""
    return in_batches(rows, lambda row: len(row.members), _BATCH_MEMBERS)


def lines_of(source: ClusterSource, cluster: bytes) -> list[int]:
    """Return the lines in which a cluster stands, to name them in an error; the source is read once more."""
    return [row.line for row in source if row.id == cluster]
