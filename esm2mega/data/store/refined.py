"""Writes sequences as FASTA in which long proteins are pieces, with the range of residues in the id.

The pieces are those that training takes with `data.crop=chunk`: the fewest, of lengths that differ by one
residue at most, the longer ones first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from esm2mega.data.readers.base import Block, Record, RecordSource
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.stream.samples import chunk, piece_name
from esm2mega.errors import UserError
from esm2mega.files import refuse_compressed, replacing

LONGEST_PIECE = 1022
"""Most residues of a piece by default: the default of `data.max_seq_length`, less `<cls>` and `<eos>`."""


@dataclass(frozen=True)
class RefinedFasta:
    """Says where the pieces are written.

    Attributes:
        path: the file, which must not exist.
        max_length: most residues of a piece.
    """

    path: Path
    max_length: int = LONGEST_PIECE

    def check(self) -> None:
        """Refuse a length that leaves nothing, a file that would be lost, and a name of a compressed file."""
        if self.max_length < 1:
            raise UserError(f"--max-length={self.max_length} is too small; give at least 1")
        if self.path.exists():
            raise UserError(f"{self.path}: exists already; move it away, or give another --refined")
        refuse_compressed(self.path)

    def write(self, sources: Sequence[RecordSource]) -> str:
        """Write the records of all sources, in order, whole or not at all; return what was written in a line.

        A record that is not cut is written as it was read, on one line; the text behind the id of FASTA is
        kept.
        """
        proteins = pieces = 0
        with replacing(self.path, "choose another --refined") as partial, partial.open("wb") as file:
            for source in sources:
                reader = source.for_worker()
                for block in reader.blocks():
                    for record, description in _described(reader, block):
                        proteins += 1
                        for name, residues in cut(record, self.max_length):
                            pieces += 1
                            file.write(b">%b%b\n%b\n" % (name.encode(), description, residues))
        counts = f"{pieces:,} pieces of {proteins:,} sequences"
        return f"{self.path}: {counts}, of at most {self.max_length:,} residues"


def cut(record: Record, max_length: int) -> Iterator[tuple[str, bytes]]:
    """Yield id and residues of the pieces of a protein of at most `max_length` residues each."""
    count = len(record.residues)
    _, starts, lengths = chunk([count + 2], max_length + 2)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        # Tokens are counted with <cls>, so token 1 is residue 0.
        yield (
            piece_name(record.id, start, length, count),
            record.residues[max(start - 1, 0) : start + length - 1],
        )


def _described(source: RecordSource, block: Block) -> Iterator[tuple[Record, bytes]]:
    """Yield the records of a block that have residues, and what stands behind the id of each."""
    if isinstance(source, FastaReader):
        yield from source.described(block)
        return
    yield from ((record, b"") for record in source.records(block) if record.residues)
