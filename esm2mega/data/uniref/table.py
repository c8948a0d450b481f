"""Makes stores for sampling by cluster from tables with one row per member, as published on Hugging Face.

A table is a Parquet file, or a directory of Parquet files that are read in the order of their names, with the
columns `ur50_id` (the cluster), `ur90_id` (the member) and `sequence`. Rows of a cluster need not lie
together. The row of a member in the table is its row in the store; clusters are in the order of their first
members. The validation table has one row per cluster, whose `ur50_id` becomes the id.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2mega.data.readers.base import ByteProgress, Record
from esm2mega.data.readers.row_files import ParquetFile, protein
from esm2mega.data.store.prepare import PrepareReport
from esm2mega.data.store.staging import staged
from esm2mega.data.store.token_store import StoreWriter
from esm2mega.data.uniref.build import ClusterReport
from esm2mega.data.uniref.cluster_join import append_proteins, protein_batches
from esm2mega.data.uniref.id_index import IdIndex, map_array
from esm2mega.data.uniref.leakage import IndexedIds, refuse_shared_files
from esm2mega.errors import UserError

_BLOCK = 1 << 20


class MemberRow(NamedTuple):
    """Holds one row: cluster id, member id, residues, and its number from 1 through all files of a table."""

    cluster: str
    id: str
    residues: bytes
    line: int


class MemberTable:
    """Iterates over the rows of a table."""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Open all files.

        Args:
            path: a Parquet file, or a directory of them.
            progress: told about the bytes of the files, once.
        """
        self.path = Path(path)
        paths = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not paths:
            raise UserError(f"{path}: has no *.parquet files; name a Parquet file or a directory of them")
        columns = ("ur50_id", "ur90_id", "sequence")
        self.files = [ParquetFile(file, columns, progress) for file in paths]
        self._starts = np.cumsum([0, *(file.num_rows for file in self.files)])

    def __iter__(self) -> Iterator[MemberRow]:
        """Yield the rows in order."""
        for file, start in zip(self.files, self._starts.tolist(), strict=False):
            for line, (cluster, member, sequence) in file.rows():
                name = file.text(member, line, "ur90_id")
                residues = protein(file, line, name, sequence).residues
                yield MemberRow(file.text(cluster, line, "ur50_id"), name, residues, start + line)

    def location(self, line: int) -> str:
        """Say where a row stands, for messages."""
        number = int(np.searchsorted(self._starts, line)) - 1
        return self.files[number].location(line - int(self._starts[number]))

    def provenance(self) -> list[dict[str, Any]]:
        """Return the manifest's entries about the files."""
        return [{"name": file.path.name, "role": "table", "sha256": file.sha256} for file in self.files]


def prepare_table(
    train: str | Path, out: str | Path, valid: str | Path | None = None, progress: ByteProgress | None = None
) -> ClusterReport:
    """Write `out/train` with clusters and, when there is a table for it, `out/valid`.

    Args:
        train: table of the members of the training clusters.
        out: directory to create.
        valid: table of the representatives of held-out clusters; None for no validation set.
        progress: told about bytes as the files are hashed; each file is read after it was hashed.

    Returns:
        The counts.
    """
    out = Path(out)
    refuse_shared_files({"--table": train}, {} if valid is None else {"--valid-table": valid})
    table = MemberTable(train, progress)
    held_out = None if valid is None else MemberTable(valid, progress)
    counts = {}
    with staged(out) as staging:
        scratch = staging / "index"
        clusters, members = IdIndex(scratch / "clusters"), IdIndex(scratch / "members")
        with StoreWriter(staging / "train") as writer:
            for batch in protein_batches(table):
                clusters.append([row.cluster.encode() for row in batch])
                members.append([row.id.encode() for row in batch])
                append_proteins(writer, table, batch)
            clusters.close()
            members.close()
            IndexedIds(table, members).refuse_repeats("a member must occur once")
            count, largest = _write_clusters(clusters, scratch / "order", writer)
            writer.provenance = {
                "sources": table.provenance(),
                "split": {"name": "train"},
                "clusters": {"clusters": count, "largest": largest, "held_out": 0, "left_out": 0},
            }
        if held_out is not None:
            with StoreWriter(staging / "valid") as valid_writer:
                ids = IndexedIds(held_out, IdIndex(scratch / "valid"))
                for batch in protein_batches(held_out):
                    ids.ids.append([row.cluster.encode() for row in batch])
                    append_proteins(
                        valid_writer,
                        held_out,
                        [Record(row.cluster, row.residues, row.line) for row in batch],
                    )
                ids.ids.close()
                ids.refuse_repeats()
                ids.refuse_overlap(clusters, f"also a training cluster in {table.path}")
                valid_writer.provenance = {"sources": held_out.provenance(), "split": {"name": "valid"}}
            counts["valid"] = valid_writer.counts
        shutil.rmtree(scratch)
    return ClusterReport(PrepareReport(out, {"train": writer.counts, **counts}), count, largest)


def _write_clusters(clusters: IdIndex, path: Path, writer: StoreWriter) -> tuple[int, int]:
    """Group the rows by their cluster, and append the clusters to the store.

    Args:
        clusters: the cluster id of every row.
        path: path of a temporary file of 8 bytes per row.
        writer: writer of the store of the rows.

    Returns:
        The number of clusters, and the size of the largest cluster.
    """
    # A cluster is identified by its first row. A number for each row holds that first row in its upper bits
    # and the row itself in the lower ones: once these are sorted, the rows of a cluster lie together.
    bits = np.int64(max(len(clusters) - 1, 0).bit_length())
    with open(path, "xb") as file:
        for first, ids in clusters.blocks():
            file.write(((clusters.find(ids) << bits) | np.arange(first, first + len(ids))).tobytes())
    order = map_array(path, np.int64, mode="r+")
    order.sort()
    count = largest = 0
    begin = 0
    while begin < len(order):
        end = min(begin + _BLOCK, len(order))
        # Extend the block to the end of its last cluster.
        end = int(np.searchsorted(order, ((order[end - 1] >> bits) + 1) << bits))
        firsts, rows = order[begin:end] >> bits, order[begin:end] & ((np.int64(1) << bits) - 1)
        sizes = np.diff(np.flatnonzero(np.diff(firsts, prepend=-1, append=-1)))
        names = [clusters[row].decode() for row in firsts[np.cumsum(sizes) - sizes].tolist()]
        writer.append_clusters(names, sizes, rows)
        count, largest, begin = count + len(sizes), max(largest, int(sizes.max())), end
    return count, largest
