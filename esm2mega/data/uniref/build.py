"""Makes stores for sampling by cluster from UniRef50, UniRef90 and their mapping (`prepare uniref`).

The training store holds UniRef90 sequences in the order of their FASTA file, and their UniRef50 clusters in
the order of the mapping. Validation and test hold UniRef50 representatives: from files of their own, or drawn
from the UniRef50 file, in which case no member of their clusters is left in the training store.

They are drawn as in `prepare fasta`: of a seeded random order of all UniRef50 records the first are for
validation and the next for test; every split keeps the order of the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.readers.base import ByteProgress
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.store.manifest import StoreCounts
from esm2mega.data.store.prepare import PrepareReport
from esm2mega.data.store.splits import SPLITS
from esm2mega.data.store.staging import staged
from esm2mega.data.store.token_store import StoreWriter
from esm2mega.data.uniref.cluster_join import ClusterTable, append_proteins, protein_batches, provenance
from esm2mega.data.uniref.id_index import IdIndex
from esm2mega.data.uniref.leakage import DrawnRecords, IndexedIds, SplitSizes, refuse_shared_files
from esm2mega.data.uniref.mapping import ClusterRow, MappingReader, batched, shown
from esm2mega.errors import UserError


@dataclass(frozen=True)
class ClusterReport:
    """Says what the stores with clusters hold.

    Attributes:
        stores: the counts of each split.
        clusters: clusters of the training store.
        largest: members of the largest cluster.
        held_out_clusters: clusters of the mapping that are in validation or test.
        other_clusters: clusters of the mapping that were left out, being neither in `uf50` nor held out.
    """

    stores: PrepareReport
    clusters: int
    largest: int
    held_out_clusters: int = 0
    other_clusters: int = 0

    def lines(self) -> list[str]:
        """Return a line per split for the user, and a line about the clusters."""
        train = self.stores.counts["train"]
        return [
            *self.stores.lines(),
            f"{self.stores.out / 'train'}: {self.clusters:,} clusters of "
            f"{train.sequences / self.clusters:.2f} members on average, {self.largest:,} in the largest; "
            f"{self.held_out_clusters:,} clusters held out, {self.other_clusters:,} left out, not being in "
            "the UniRef50 file; dropped sequences are those of no training cluster",
        ]


@dataclass(frozen=True)
class UniRefInputs:
    """Names the files of `prepare uniref`.

    Attributes:
        uf50: FASTA of the representatives of the clusters.
        uf90: FASTA of all members of the clusters.
        mapping: file that says which members belong to which cluster, see `esm2mega.data.uniref.mapping`.
        valid: FASTA of representatives held out for validation, not in `uf50`; None for no such file.
        test: FASTA of representatives held out for the final test, not in `uf50`; None for no such file.
    """

    uf50: str | Path
    uf90: str | Path
    mapping: str | Path
    valid: str | Path | None = None
    test: str | Path | None = None

    @property
    def held_out(self) -> dict[str, str | Path]:
        """Return the files of validation and test that were given, by split."""
        return {name: path for name, path in (("valid", self.valid), ("test", self.test)) if path is not None}


def prepare_uniref(
    inputs: UniRefInputs,
    out: str | Path,
    sizes: SplitSizes | None = None,
    drop_other_clusters: bool = False,
    progress: ByteProgress | None = None,
) -> ClusterReport:
    """Write `out/train` with clusters and, where asked for, `out/valid` and `out/test`.

    Args:
        inputs: the files.
        out: directory to create.
        sizes: sizes of validation and test, drawn from the UniRef50 file in place of files for them.
        drop_other_clusters: leave out, and count, clusters of the mapping that are neither in the UniRef50
            file nor held out; otherwise the first such cluster is an error.
        progress: told about bytes as they are read (`bytes_to_read` is the total).

    Returns:
        The counts.
    """
    out = Path(out)
    sizes = sizes or SplitSizes()
    _check_arguments(inputs, sizes)
    with staged(out) as staging:
        job = _Job(inputs, sizes, drop_other_clusters, progress, staging)
        return job.run(out)


def bytes_to_read(inputs: UniRefInputs, sizes: SplitSizes) -> int:
    """Return the total number of bytes for a `ByteProgress`; missing files count 0."""
    paths = [inputs.uf50, inputs.uf90, inputs.mapping, *inputs.held_out.values()]
    if sizes.valid + sizes.test:
        paths.append(inputs.uf50)  # read once for its ids, and once for the sequences that were drawn
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file())


def _check_arguments(inputs: UniRefInputs, sizes: SplitSizes) -> None:
    for name, size in (("val-size", sizes.valid), ("test-size", sizes.test)):
        if size < 0:
            raise UserError(f"--{name}={size} is negative; give a number of clusters, 0 for none")
    if inputs.held_out and sizes.valid + sizes.test:
        raise UserError(
            "--valid and --test name the held-out sequences, --val-size and --test-size draw them; "
            "give one or the other"
        )
    training = {"--uf50": inputs.uf50, "--uf90": inputs.uf90, "--mapping": inputs.mapping}
    held_out = {f"--{name}": path for name, path in inputs.held_out.items()}
    refuse_shared_files(training, held_out)


@dataclass
class _Job:
    """Performs one run of `prepare_uniref`; all paths that it writes are below `staging`."""

    inputs: UniRefInputs
    sizes: SplitSizes
    drop_other_clusters: bool
    progress: ByteProgress | None
    staging: Path
    counts: dict[str, StoreCounts] = field(default_factory=dict)
    held_out_clusters: int = 0
    other_clusters: int = 0

    def run(self, out: Path) -> ClusterReport:
        scratch = self.staging / "index"
        uf50 = FastaReader(self.inputs.uf50, self.progress)
        uf90 = FastaReader(self.inputs.uf90, self.progress)
        mapping = MappingReader(self.inputs.mapping, self.progress)
        readers = {name: FastaReader(path, self.progress) for name, path in self.inputs.held_out.items()}

        representatives = IndexedIds(uf50, IdIndex(scratch / "uf50"))
        for batch in protein_batches(uf50):
            representatives.ids.append([record.id.encode() for record in batch])
        representatives.ids.close()
        representatives.refuse_repeats()
        held_out = self._write_files(readers, uf50, representatives.ids, scratch)
        drawn = self.sizes.draw(len(representatives.ids))
        table = ClusterTable(scratch / "table", mapping)
        table.fill(self._assigned(mapping, representatives.ids, drawn, held_out))
        self._refuse_unmapped(representatives, table, mapping)
        for other in held_out.values():
            other.refuse_overlap(table.members, f"a member of a cluster in {mapping.path}")
        sources = [provenance("uniref50", uf50)]
        if len(drawn.records):
            self._write_drawn(uf50, drawn, sources)
        with StoreWriter(self.staging / "train") as writer:
            table.take_proteins(uf90, writer)
            clusters, largest = table.write_clusters(writer)
            sources += [provenance("uniref90", uf90), provenance("mapping", mapping)]
            writer.provenance = {
                "sources": sources,
                "split": self._split("train", len(representatives.ids)),
                "clusters": {
                    "clusters": clusters,
                    "largest": largest,
                    "held_out": self.held_out_clusters,
                    "left_out": self.other_clusters,
                },
            }
        shutil.rmtree(scratch)
        counts = {"train": writer.counts, **self.counts}
        return ClusterReport(
            PrepareReport(out, counts), clusters, largest, self.held_out_clusters, self.other_clusters
        )

    def _write_files(
        self, readers: Mapping[str, FastaReader], uf50: FastaReader, clusters: IdIndex, scratch: Path
    ) -> dict[str, IndexedIds]:
        """Write the stores of the files for validation and test, and return their ids."""
        written: dict[str, IndexedIds] = {}
        for name, reader in readers.items():
            with StoreWriter(self.staging / name) as writer:
                held_out = IndexedIds(reader, IdIndex(scratch / name))
                for batch in protein_batches(reader):
                    held_out.ids.append([record.id.encode() for record in batch])
                    append_proteins(writer, reader, batch)
                held_out.ids.close()
                if reader.sha256 == uf50.sha256:
                    raise UserError(
                        f"{reader.path}: has the same content as {uf50.path}; what is trained on cannot be "
                        "held out"
                    )
                held_out.refuse_repeats()
                held_out.refuse_overlap(clusters, f"also a training cluster in {uf50.path}")
                for other in written.values():
                    held_out.refuse_overlap(other.ids, f"also in {other.source.path}")
                writer.provenance = {"sources": [provenance(name, reader)], "split": {"name": name}}
            self.counts[name] = writer.counts
            written[name] = held_out
        return written

    def _assigned(
        self,
        mapping: MappingReader,
        representatives: IdIndex,
        drawn: DrawnRecords,
        held_out: Mapping[str, IndexedIds],
    ) -> Iterator[tuple[list[ClusterRow], npt.NDArray[np.bool_]]]:
        """Yield the clusters of the UniRef50 file, batch by batch, and which of them were drawn."""
        for batch in batched(mapping):
            records = representatives.find([cluster.id for cluster in batch])
            absent = np.flatnonzero(records < 0).tolist()
            known = np.zeros(len(absent), dtype=bool)
            for other in held_out.values():
                known |= other.ids.find([batch[i].id for i in absent]) >= 0
            if not known.all() and not self.drop_other_clusters:
                cluster = batch[absent[int(np.argmin(known))]]
                raise UserError(
                    f"{mapping.location(cluster.line)}: cluster {shown(cluster.id)} is not in "
                    f"{self.inputs.uf50}; add its representative there, remove the line, or leave all such "
                    "clusters out with --drop-other-clusters"
                )
            self.other_clusters += int((~known).sum())
            drawn_out = drawn.of(records) != SPLITS.index("train")
            self.held_out_clusters += int(known.sum()) + int(drawn_out.sum())
            kept = np.flatnonzero(records >= 0)
            yield [batch[i] for i in kept.tolist()], drawn_out[kept]

    def _write_drawn(self, uf50: FastaReader, drawn: DrawnRecords, sources: Sequence[dict[str, Any]]) -> None:
        """Read the UniRef50 file again, and write the representatives that were drawn."""
        first = 0
        with ExitStack() as stack:
            names = [name for name in SPLITS[1:] if SPLITS.index(name) in drawn.splits]
            writers = {name: stack.enter_context(StoreWriter(self.staging / name)) for name in names}
            for batch in protein_batches(uf50):
                assigned = drawn.of(np.arange(first, first + len(batch)))
                first += len(batch)
                for name, writer in writers.items():
                    chosen = np.flatnonzero(assigned == SPLITS.index(name)).tolist()
                    append_proteins(writer, uf50, [batch[i] for i in chosen])
            for name, writer in writers.items():
                writer.provenance = {"sources": list(sources), "split": self._split(name, first)}
                self.counts[name] = writer.counts

    def _split(self, name: str, total: int) -> dict[str, Any]:
        """Return the manifest's entry about the split."""
        if not self.sizes.valid + self.sizes.test:
            return {"name": name}
        return {
            "name": name,
            "seed": self.sizes.seed,
            "valid_size": self.sizes.valid,
            "test_size": self.sizes.test,
            "total": total,
        }

    @staticmethod
    def _refuse_unmapped(representatives: IndexedIds, table: ClusterTable, mapping: MappingReader) -> None:
        """Raise UserError at the first record of the UniRef50 file that the mapping has no line for."""
        for first, ids in representatives.ids.blocks():
            absent = np.flatnonzero(table.ids.find(ids) < 0)
            if len(absent):
                name = ids[absent[0]]
                cure = (
                    "it stands in the first line, which is skipped: put a header line above it"
                    if name == mapping.header_id
                    else "add its line there, or remove the record"
                )
                raise UserError(
                    f"{representatives.location(first + int(absent[0]))}: cluster {shown(name)} has no "
                    f"line in {mapping.path}; {cure}"
                )
