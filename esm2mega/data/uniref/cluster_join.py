"""Joins clusters, which name their members by id, with proteins, which come in any order.

The clusters are read first and kept on disk with all ids indexed. The proteins are then read once: each
protein of a training cluster becomes the next row of the store, and this row is noted at its place in the
cluster. So membership never depends on the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from esm2mega.data.readers.base import Record
from esm2mega.data.store.intake import Located, check_known, in_batches
from esm2mega.data.store.token_store import StoreWriter
from esm2mega.data.uniref.id_index import IdIndex, map_array
from esm2mega.data.uniref.mapping import (
    ClusterRow,
    ClusterSource,
    Protein,
    ProteinSource,
    batched,
    lines_of,
    shown,
)
from esm2mega.errors import UserError

# Residues handed to a writer at once: enough to make the cost per batch negligible, and small in memory.
_BATCH_RESIDUES = 4 << 20

# Loops over all members handle this many at once.
_BLOCK = 1 << 20

# These stand in place of a member's row. The member was not met yet, and belongs to a training cluster or to
# a held-out one; or it was met, and left out because its cluster is held out.
_EXPECTED, _EXPECTED_HELD_OUT, _HELD_OUT = -1, -2, -3


ProteinT = TypeVar("ProteinT", bound=Protein)


class ClusterTable:
    """Keeps all clusters on disk, including held-out ones, with an index of their ids and of the members."""

    def __init__(self, directory: Path, source: ClusterSource) -> None:
        """Make empty files.

        Args:
            directory: directory for the files, which is made.
            source: where the clusters come from, for messages.
        """
        directory.mkdir(parents=True)
        self._directory = directory
        self.source = source
        self.ids = IdIndex(directory / "cluster-ids")
        self.members = IdIndex(directory / "member-ids")

    def fill(self, batches: Iterable[tuple[Sequence[ClusterRow], npt.NDArray[np.bool_]]]) -> None:
        """Take all clusters and build the indices; refuse a cluster or a member that occurs twice.

        Args:
            batches: clusters, n at a time, and which of them are held out, [n].
        """
        with open(self._directory / "ends", "xb") as ends, open(self._directory / "rows", "xb") as rows:
            end = 0
            for clusters, held_out in batches:
                self.ids.append([cluster.id for cluster in clusters])
                self.members.append([member for cluster in clusters for member in cluster.members])
                sizes = np.array([len(cluster.members) for cluster in clusters], dtype=np.int64)
                ends.write((np.cumsum(sizes) + end).tobytes())
                states = np.where(held_out, _EXPECTED_HELD_OUT, _EXPECTED).astype(np.int64)
                rows.write(np.repeat(states, sizes).tobytes())
                end += int(sizes.sum())
        self._ends = map_array(self._directory / "ends", np.int64)
        self._rows = map_array(self._directory / "rows", np.int64, mode="r+")
        self.ids.close()
        self.members.close()
        self._refuse_repeats()

    def _refuse_repeats(self) -> None:
        if found := self.ids.repeats():
            name = self.ids[found[0]]
            first, second = lines_of(self.source, name)[:2]
            raise UserError(
                f"{self.source.location(second)}: cluster {shown(name)} is listed before, at "
                f"{self.source.location(first)}{_and_more(found[2])}; join the members in one line"
            )
        if found := self.members.repeats():
            here, there = (self.ids[self._cluster_of(number)] for number in found[:2])
            member = shown(self.members[found[0]])
            line = lines_of(self.source, here)[0]
            where = (
                f"is listed twice in cluster {shown(here)}"
                if here == there
                else f"of cluster {shown(here)} is in cluster {shown(there)} too, at "
                f"{self.source.location(lines_of(self.source, there)[0])}"
            )
            raise UserError(
                f"{self.source.location(line)}: member {member} {where}{_and_more(found[2])}; "
                "every sequence belongs to one cluster, once"
            )

    def _cluster_of(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, side="right"))

    def take_proteins(self, proteins: ProteinSource, writer: StoreWriter) -> None:
        """Append the members of the training clusters to the store, in the order of `proteins`.

        Proteins of held-out clusters and of no cluster are left out, and counted as dropped by the writer.
        """
        next_row = 0
        for batch in protein_batches(proteins):
            numbers = self.members.find([record.id.encode() for record in batch])
            member = numbers >= 0
            states = np.where(member, self._rows[numbers], 0)
            self._refuse_second_copies(
                proteins, batch, numbers, member & ((states >= 0) | (states == _HELD_OUT))
            )
            chosen = member & (states == _EXPECTED)
            count = int(chosen.sum())
            self._rows[numbers[member & (states == _EXPECTED_HELD_OUT)]] = _HELD_OUT
            self._rows[numbers[chosen]] = np.arange(next_row, next_row + count)
            next_row += count
            append_proteins(writer, proteins, [batch[i] for i in np.flatnonzero(chosen).tolist()])
            writer.counts.dropped_sequences += len(batch) - count
        self._refuse_missing(proteins)

    def _refuse_second_copies(
        self,
        proteins: ProteinSource,
        batch: Sequence[Record],
        numbers: npt.NDArray[np.int64],
        met: npt.NDArray[np.bool_],
    ) -> None:
        """Raise UserError where a member was met in an earlier batch, or is in this one twice."""
        first = np.zeros(len(batch), dtype=bool)
        first[np.unique(numbers, return_index=True)[1]] = True
        repeated = np.flatnonzero(met | ((numbers >= 0) & ~first))
        if len(repeated):
            record = batch[repeated[0]]
            earlier = next(other.line for other in proteins if other.id == record.id)
            raise UserError(
                f"{proteins.location(record.line)}: {record.id!r} occurs earlier, at "
                f"{proteins.location(earlier)}; a member must occur once"
            )

    def _refuse_missing(self, proteins: ProteinSource) -> None:
        first, count = -1, 0
        for begin in range(0, len(self._rows), _BLOCK):
            block = self._rows[begin : begin + _BLOCK]
            missing = np.flatnonzero((block == _EXPECTED) | (block == _EXPECTED_HELD_OUT))
            if len(missing) and first < 0:
                first = begin + int(missing[0])
            count += len(missing)
        if count:
            cluster = self.ids[self._cluster_of(first)]
            raise UserError(
                f"{self.source.location(lines_of(self.source, cluster)[0])}: member "
                f"{shown(self.members[first])} of cluster {shown(cluster)} is not in {proteins.path}"
                f"{_and_more(count)}; ids must be equal to the last character"
            )

    def write_clusters(self, writer: StoreWriter) -> tuple[int, int]:
        """Append the training clusters, in the order in which they were read, to the store of their members.

        Returns:
            The number of clusters, and the size of the largest cluster.
        """
        count = largest = 0
        for first, ids in self.ids.blocks():
            ends = self._ends[first : first + len(ids)]
            start = int(self._ends[first - 1]) if first else 0
            sizes = np.diff(ends, prepend=start)
            rows = self._rows[start : int(ends[-1])]
            training = rows[ends - sizes - start] >= 0
            if training.any():
                chosen = [ids[i].decode() for i in np.flatnonzero(training).tolist()]
                writer.append_clusters(chosen, sizes[training], rows[rows >= 0])
                count += len(chosen)
                largest = max(largest, int(sizes[training].max()))
        return count, largest


def all_training(source: ClusterSource) -> Iterator[tuple[list[ClusterRow], npt.NDArray[np.bool_]]]:
    """Yield batches for `ClusterTable.fill` with no cluster held out."""
    for batch in batched(source):
        yield batch, np.zeros(len(batch), dtype=bool)


def protein_batches(proteins: Iterable[ProteinT]) -> Iterator[list[ProteinT]]:
    """Yield proteins in lists of a few MiB of residues."""
    return in_batches(proteins, lambda protein: len(protein.residues), _BATCH_RESIDUES)


def append_proteins(writer: StoreWriter, source: Located, records: Sequence[Protein]) -> None:
    """Append proteins to a store; refuse one without any known residue."""
    for record in records:
        check_known(source, record.line, record.id, record.residues)
    writer.append([record.id for record in records], [record.residues for record in records])


def provenance(role: str, source: Any) -> dict[str, Any]:
    """Return the manifest's entry about an input that was read to its end."""
    return {"name": source.path.name, "role": role, "sha256": source.sha256}


def _and_more(count: int) -> str:
    return f" ({count:,} such ids in all)" if count > 1 else ""
