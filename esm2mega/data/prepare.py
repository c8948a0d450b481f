"""`prepare fasta`: FASTA files to a training store and, when asked for, validation and test stores.

Everything is written under a temporary name beside the output directory and renamed once, after the last
record was found good: an error or a kill leaves no output that a reader accepts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega.data import sampling, tokenizer
from esm2mega.data.fasta import ByteProgress, FastaReader, FastaRecord
from esm2mega.data.store import StoreCounts, StoreWriter, partial_path
from esm2mega.errors import MachineError, UserError

SPLITS = ("train", "valid", "test")

# Residues handed to a writer at once: large enough that the cost per batch vanishes, small beside any memory.
_BATCH_RESIDUES = 4 << 20


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare_fasta` wrote: the counts of each split under its name, in the order of `SPLITS`."""

    out: Path
    counts: dict[str, StoreCounts]

    def lines(self) -> list[str]:
        """One line per split for the user, with everything that was changed on the way in."""
        return [
            f"{self.out / split}: {count.sequences:,} sequences, {count.residues:,} residues; "
            f"{count.lower_case_residues:,} lower-case residues raised, {count.unknown_residues:,} unknown "
            f"residues stored as <unk>, {count.dropped_sequences:,} sequences dropped"
            for split, count in self.counts.items()
        ]


def prepare_fasta(
    inputs: Sequence[str | Path],
    out: str | Path,
    valid_size: int = 0,
    test_size: int = 0,
    seed: int = 1234,
    progress: ByteProgress | None = None,
) -> PrepareReport:
    """Writes `out/train` and, for sizes above 0, `out/valid` and `out/test`.

    The held-out proteins are drawn at random without replacement: which ones depends only on `seed` and on
    the number of sequences. Every split keeps the order of the input.

    Args:
        inputs: FASTA files, plain or gzip, read in this order.
        out: directory to create.
        valid_size: sequences held out for validation.
        test_size: sequences held out for the final test.
        seed: of the split.
        progress: told about bytes of the inputs as they are read (`fasta.total_bytes` is the total).

    Returns:
        The counts of each split.
    """
    out = Path(out)
    check_arguments(inputs, out, valid_size, test_size)
    readers = [FastaReader(path, progress) for path in inputs]
    split = _HeldOut.draw(inputs, valid_size, test_size, seed)
    staging = partial_path(out)
    try:
        staging.mkdir(parents=True)
        counts = _write_splits(readers, staging, split)
        os.rename(staging, out)
    except OSError as error:
        raise MachineError(
            f"{out}: cannot be written ({error.strerror or error}); nothing was kept"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return PrepareReport(out, counts)


def check_arguments(inputs: Sequence[str | Path], out: str | Path, valid_size: int, test_size: int) -> None:
    """Refuses what can be refused without reading; `prepare_fasta` calls it too."""
    if not inputs:
        raise UserError("no input: name at least one FASTA file")
    resolved = [Path(path).resolve() for path in inputs]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise UserError(f"{inputs[position]}: given twice; name each FASTA file once")
    for name, size in (("val-size", valid_size), ("test-size", test_size)):
        if size < 0:
            raise UserError(f"--{name}={size} is negative; give a number of sequences, 0 for none")
    if Path(out).exists():
        raise UserError(f"{out}: exists already; name another directory or remove it")


@dataclass(frozen=True)
class _HeldOut:
    """Which records, by position over all inputs, go to which split.

    Attributes:
        records: positions that are held out, ascending, int64 [m].
        splits: index into `SPLITS` of each, int64 [m].
        num_records: records in all inputs; None when nothing is held out and they were not counted.
        provenance: the manifest's entry about the split.
    """

    records: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int64]
    num_records: int | None
    provenance: dict[str, int]

    @staticmethod
    def draw(inputs: Sequence[str | Path], valid_size: int, test_size: int, seed: int) -> _HeldOut:
        """The first places of a random order of all records are validation, the next ones test."""
        held_out = valid_size + test_size
        nothing = np.zeros(0, dtype=np.int64)
        if not held_out:
            return _HeldOut(nothing, nothing, None, {})
        total = sum(FastaReader(path).count_headers() for path in inputs)
        if held_out >= total > 0:  # without any record, reading says better what is wrong with the file
            raise UserError(
                f"--val-size={valid_size} and --test-size={test_size} leave nothing to train on: "
                f"the input has {total} sequences; hold out fewer than that"
            )
        drawn = sampling.permute(np.arange(min(held_out, total)), total, seed, sampling.Purpose.SPLIT)
        order = np.argsort(drawn)
        splits = np.where(np.arange(len(drawn)) < valid_size, SPLITS.index("valid"), SPLITS.index("test"))
        provenance = {"seed": seed, "valid_size": valid_size, "test_size": test_size, "total": total}
        return _HeldOut(drawn[order], splits[order], total, provenance)

    def names(self) -> list[str]:
        """The splits that get any record."""
        return [split for index, split in enumerate(SPLITS) if index == 0 or index in self.splits]

    def of_records(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Index into `SPLITS` of the records `first` to `first + count - 1`, [count]."""
        assigned = np.full(count, SPLITS.index("train"), dtype=np.int64)
        begin, end = np.searchsorted(self.records, (first, first + count))
        assigned[self.records[begin:end] - first] = self.splits[begin:end]
        return assigned


def _write_splits(
    readers: Sequence[FastaReader], staging: Path, held_out: _HeldOut
) -> dict[str, StoreCounts]:
    """Reads all inputs once and writes every split into `staging`; returns the counts per split."""
    with ExitStack() as stack:
        writers = {name: stack.enter_context(StoreWriter(staging / name)) for name in held_out.names()}
        done = 0
        for batch in _batches(readers):
            assigned = held_out.of_records(done, len(batch))
            for name, writer in writers.items():
                chosen = np.flatnonzero(assigned == SPLITS.index(name)).tolist()
                writer.append([batch[i].id for i in chosen], [batch[i].residues for i in chosen])
            done += len(batch)
        if held_out.num_records not in (None, done):
            raise UserError(
                f"the input had {held_out.num_records} sequences when counted and {done} when read"
            )
        for name, writer in writers.items():
            writer.provenance["sources"] = [
                {"name": reader.path.name, "sha256": reader.sha256, "sequences": reader.num_records}
                for reader in readers
            ]
            writer.provenance["split"] = {"name": name, **held_out.provenance}
    return {name: writer.counts for name, writer in writers.items()}


def _batches(readers: Sequence[FastaReader]) -> Iterator[list[FastaRecord]]:
    """Yields the records of all files in order, in batches; refuses a record without any known residue."""
    batch: list[FastaRecord] = []
    size = 0
    for reader in readers:
        for record in reader:
            if not record.residues.strip(tokenizer.UNKNOWN_BYTES):
                raise UserError(
                    f"{reader.path}:{record.line}: the sequence of {record.id!r} has only unknown residues "
                    f"({record.residues[:10].decode()!r}); correct or remove the record"
                )
            batch.append(record)
            size += len(record.residues)
            if size >= _BATCH_RESIDUES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
