"""Makes stores for sampling by cluster from the Parquet and SQLite files of BioNeMo 2.

    train_clusters.parquet   columns `ur90_id`, a list of member ids, and optionally `ur50_id`, the cluster id
    valid_clusters.parquet   column `ur50_id`, one representative per row
    train.db, validation.db  SQLite, table `protein(id, sequence)`

Messages name rows of these files, counted from 1. The id of a cluster without one is its row.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm2mega.data.readers.base import ByteProgress
from esm2mega.data.readers.row_files import ParquetFile, ProteinDatabase
from esm2mega.data.store.prepare import PrepareReport
from esm2mega.data.store.staging import staged
from esm2mega.data.store.token_store import StoreWriter
from esm2mega.data.uniref.build import ClusterReport
from esm2mega.data.uniref.cluster_join import (
    ClusterTable,
    all_training,
    append_proteins,
    protein_batches,
    provenance,
)
from esm2mega.data.uniref.id_index import IdIndex
from esm2mega.data.uniref.leakage import IndexedIds, refuse_shared_files
from esm2mega.data.uniref.mapping import ClusterRow, shown
from esm2mega.errors import UserError

_BATCH_IDS = 1 << 16


class IdRow(NamedTuple):
    """Holds an id and the number of its row."""

    id: bytes
    line: int


class ClusterParquet(ParquetFile):
    """Iterates over the clusters of a `train_clusters.parquet`."""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Open the file.

        Args:
            path: path of the file.
            progress: told about the bytes of the file.
        """
        super().__init__(path, ["ur90_id"], progress)
        self.named = "ur50_id" in self.available
        if self.named:
            self.columns.append("ur50_id")

    def __iter__(self) -> Iterator[ClusterRow]:
        """Yield the clusters in the order of the rows."""
        for line, (members, *name) in self.rows():
            if not isinstance(members, list):
                raise UserError(f"{self.location(line)}: ur90_id is {members!r}, not a list of ids")
            if not members:
                raise UserError(f"{self.location(line)}: the cluster has no members; remove the row")
            cluster = self.text(name[0], line, "ur50_id") if name else str(line)
            encoded = [self.text(member, line, "a member in ur90_id").encode() for member in members]
            yield ClusterRow(cluster.encode(), encoded, line)


class IdParquet(ParquetFile):
    """Iterates over the ids of a `valid_clusters.parquet`."""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Open the file.

        Args:
            path: path of the file.
            progress: told about the bytes of the file.
        """
        super().__init__(path, ["ur50_id"], progress)

    def __iter__(self) -> Iterator[IdRow]:
        """Yield the ids in the order of the rows."""
        for line, (name,) in self.rows():
            yield IdRow(self.text(name, line, "ur50_id").encode(), line)


class BioNeMoInputs(NamedTuple):
    """Names the files of a BioNeMo 2 data set; validation has both of its files, or neither."""

    train_clusters: str | Path
    train_database: str | Path
    valid_clusters: str | Path | None = None
    valid_database: str | Path | None = None


def prepare_bionemo(
    inputs: BioNeMoInputs, out: str | Path, progress: ByteProgress | None = None
) -> ClusterReport:
    """Write `out/train` with clusters and, where there are files for it, `out/valid`.

    Args:
        inputs: the files.
        out: directory to create.
        progress: told about bytes as the files are hashed; each file is read after it was hashed.

    Returns:
        The counts.
    """
    out = Path(out)
    if (inputs.valid_clusters is None) != (inputs.valid_database is None):
        raise UserError(
            "validation needs both --valid-cluster-path and --valid-database-path; give the other one too"
        )
    held_out: dict[str, str | Path] = {}
    if inputs.valid_clusters is not None and inputs.valid_database is not None:
        held_out = {
            "--valid-cluster-path": inputs.valid_clusters,
            "--valid-database-path": inputs.valid_database,
        }
    training = {"--train-cluster-path": inputs.train_clusters, "--train-database-path": inputs.train_database}
    refuse_shared_files(training, held_out)
    clusters = ClusterParquet(inputs.train_clusters, progress)
    proteins = ProteinDatabase(inputs.train_database, progress)
    valid_inputs = None
    if held_out:
        valid_inputs = (
            IdParquet(held_out["--valid-cluster-path"], progress),
            ProteinDatabase(held_out["--valid-database-path"], progress),
        )
    with staged(out) as staging:
        scratch = staging / "index"
        table = ClusterTable(scratch / "table", clusters)
        table.fill(all_training(clusters))
        counts = {}
        if valid_inputs is not None:
            with StoreWriter(staging / "valid") as writer:
                _take_validation(*valid_inputs, table, writer, scratch)
            counts["valid"] = writer.counts
        with StoreWriter(staging / "train") as writer:
            table.take_proteins(proteins, writer)
            count, largest = table.write_clusters(writer)
            writer.provenance = {
                "sources": [provenance("clusters", clusters), provenance("proteins", proteins)],
                "split": {"name": "train"},
                "clusters": {"clusters": count, "largest": largest, "held_out": 0, "left_out": 0},
            }
        shutil.rmtree(scratch)
    return ClusterReport(PrepareReport(out, {"train": writer.counts, **counts}), count, largest)


def _take_validation(
    ids: IdParquet, database: ProteinDatabase, table: ClusterTable, writer: StoreWriter, scratch: Path
) -> None:
    """Write the representatives that `ids` names, in the order of the database; all must be there."""
    index = IdIndex(scratch / "valid")
    rows = iter(ids)
    while batch := list(islice(rows, _BATCH_IDS)):
        index.append([row.id for row in batch])
    index.close()
    clusters = table.source
    assert isinstance(clusters, ClusterParquet)
    if ids.sha256 == clusters.sha256:
        raise UserError(f"{ids.path}: has the same content as {clusters.path}; it cannot be held out")
    held_out = IndexedIds(ids, index)
    held_out.refuse_repeats()
    if clusters.named:
        held_out.refuse_overlap(table.ids, f"also a training cluster in {clusters.path}")
    held_out.refuse_overlap(table.members, f"a member of a cluster in {clusters.path}")
    met = np.zeros(len(index), dtype=bool)
    for records in protein_batches(database):
        numbers = index.find([record.id.encode() for record in records])
        chosen = [records[i] for i in np.flatnonzero(numbers >= 0).tolist()]
        for record, number in zip(chosen, numbers[numbers >= 0].tolist(), strict=True):
            if met[number]:
                raise UserError(
                    f"{database.location(record.line)}: {record.id!r} occurs before; remove this row"
                )
            met[number] = True
        append_proteins(writer, database, chosen)
        writer.counts.dropped_sequences += len(records) - len(chosen)
    if not met.all():
        first = int(np.argmin(met))
        raise UserError(
            f"{held_out.location(first)}: {shown(index[first])} is not in {database.path}; ids must be "
            "equal to the last character"
        )
    writer.provenance = {
        "sources": [provenance("representatives", ids), provenance("proteins", database)],
        "split": {"name": "valid"},
    }
