"""Makes a training store and, when asked, validation and test stores from sequence files (`prepare fasta`).

First the inputs become parts, in parallel (`parts`). Then the parts are merged into the stores, since it is
only known which records are held out when all are counted. Everything happens in a directory beside the
output, `.NAME.prepare.partial`, which no reader accepts; the stores are renamed once, when all are complete.
An error removes that directory. A kill leaves it, and the same command continues with the finished parts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.data import counter_rng
from esm2mega.data.overlap import find_overlap
from esm2mega.data.readers import text
from esm2mega.data.readers.base import ByteProgress, RecordSource, SourceOptions
from esm2mega.data.readers.sources import open_source
from esm2mega.data.readers.streams import spooled
from esm2mega.data.store.manifest import StoreCounts
from esm2mega.data.store.parts import Part, default_workers, write_parts
from esm2mega.data.store.shards import SHARD_BYTES, SHARD_UNIT
from esm2mega.data.store.staging import check_new, staging_directory
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.errors import MachineError, UserError
from esm2mega.files import shortened

SPLITS = ("train", "valid", "test")
TRAIN = SPLITS.index("train")

OpenProgress = Callable[[str, int], AbstractContextManager[ByteProgress | None]]
"""This shows the progress of a stage, given its name and the number of bytes to go through."""

# Parts are merged in batches of this many proteins: some tens of MB of residues, however large a part is.
_MERGED_RECORDS = 1 << 16


@dataclass(frozen=True)
class PrepareOptions:
    """Says how inputs are read and stores are written.

    Attributes:
        source: formats and columns of the inputs.
        workers: processes that parse and encode; None for as many as this process may use cores. The output
            does not depend on it.
        shard_bytes: largest size of a file of tokens, a multiple of `shards.SHARD_UNIT`.
        allow_unknown: whether a protein may have unknown residues alone.
    """

    source: SourceOptions = SourceOptions()
    workers: int | None = None
    shard_bytes: int = SHARD_BYTES
    allow_unknown: bool = False


@dataclass(frozen=True)
class PrepareReport:
    """Says what `prepare_fasta` wrote.

    Attributes:
        out: directory of the stores.
        counts: counts of each split under its name, in the order of `SPLITS`.
        notes: how inputs were read, where that was not obvious, what an earlier attempt had done, and which
            splits share proteins.
    """

    out: Path
    counts: dict[str, StoreCounts]
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Return the notes, and a line per split that counts sequences, residues and what was changed."""
        return [
            *self.notes,
            *(
                f"{self.out / split}: {count.sequences:,} sequences, {count.residues:,} residues; "
                f"{count.lower_case_residues:,} lower-case residues raised, {count.unknown_residues:,} "
                f"unknown residues stored as <unk>, {count.dropped_sequences:,} sequences dropped"
                for split, count in self.counts.items()
            ),
        ]


def prepare_fasta(
    inputs: Sequence[str | Path],
    out: str | Path,
    valid_size: int = 0,
    test_size: int = 0,
    seed: int = 1234,
    options: PrepareOptions = PrepareOptions(),
    open_progress: OpenProgress | None = None,
    split: str | None = None,
) -> PrepareReport:
    """Write `out/train` and, for sizes above 0, `out/valid` and `out/test`.

    The held-out proteins are drawn at random without replacement, and depend only on `seed` and on the number
    of sequences; or the splits lie one behind the other. Every split keeps the order of the input. A sequence
    that the input repeats may be in several splits, which a note says.

    Args:
        inputs: files in any format of `sources`, or streams, read in this order.
        out: directory to create.
        valid_size: sequences held out for validation.
        test_size: sequences held out for the final test.
        seed: seed of the split.
        options: how to read, number of processes, size of files.
        open_progress: shows the progress of each stage.
        split: sizes of the splits that lie one behind the other in the input, such as ``900,50,50``, instead
            of a draw. They are shares, and exact if they add up to the number of sequences.

    Returns:
        The counts of each split, and notes for the user.
    """
    out = Path(out)
    _check_arguments(inputs, out, valid_size, test_size, options)
    shares = None if split is None else _shares_of(split, valid_size, test_size)
    with spooled(inputs, options.source.sequence_column) as files:
        sources = [open_source(path, options.source) for path in files.paths]

        def hold_out(total: int) -> _HeldOut:
            if shares is not None:
                return _HeldOut.by_position(total, shares)
            return _HeldOut.draw(total, valid_size, test_size, seed)

        report = _prepare(sources, out, hold_out, options, open_progress or _no_progress)
        return replace(report, notes=[files.shown(note) for note in report.notes])


def _prepare(
    sources: Sequence[RecordSource],
    out: Path,
    hold_out: Callable[[int], _HeldOut],
    options: PrepareOptions,
    open_progress: OpenProgress,
) -> PrepareReport:
    """Write the stores of opened sources; `hold_out` chooses the held-out ones of a number of sequences."""
    with staging_directory(out) as staging:
        try:
            parts = _write_parts(sources, staging / "parts", options, open_progress)
            held_out = hold_out(sum(part.sequences for part in parts))
            merger = _Merger(sources, parts, held_out, staging / "out", options.shard_bytes)
            counts = merger.run(open_progress)
            os.rename(staging / "out", out)
        except MachineError:
            raise  # the input is not at fault: the parts stay, and the same command continues later
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(staging, ignore_errors=True)
    notes = [note for source in sources for note in source.notes()]
    if resumed := sum(part.resumed for part in parts):
        notes.append(f"{out}: {resumed} of {len(parts)} parts were finished by an earlier attempt")
    return PrepareReport(out, counts, [*notes, *_repeats(out, list(counts))])


def _repeats(out: Path, splits: Sequence[str]) -> list[str]:
    """Return a line for each two splits that share proteins: those drawn may have equals in the input."""
    stores = {split: TokenStore(out / split) for split in splits}
    return [
        f"{store.path}: {found.count:,} of {len(store):,} sequences are also in {other.path}, since the "
        f"input repeats them; the first is {store.id(found.row)!r}. Training refuses such splits: prepare "
        "them again from an input without repeats, or train with data.allow_overlap=true"
        for other, store in combinations(stores.values(), 2)
        if (found := find_overlap(store, other)) is not None
    ]


def _check_arguments(
    inputs: Sequence[str | Path], out: Path, valid_size: int, test_size: int, options: PrepareOptions
) -> None:
    if not inputs:
        raise UserError("no input: name at least one file of sequences")
    resolved = [Path(path).resolve() for path in inputs]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise UserError(f"{inputs[position]}: given twice; name each file once")
    for name, size in (("val-size", valid_size), ("test-size", test_size)):
        if size < 0:
            raise UserError(f"--{name}={size} is negative; give a number of sequences, 0 for none")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers={options.workers} is too small; give at least 1")
    if options.shard_bytes < SHARD_UNIT or options.shard_bytes % SHARD_UNIT:
        raise UserError(
            f"--shard-size of {options.shard_bytes} bytes is not a multiple of {SHARD_UNIT} above 0"
        )
    check_new(out)


def _shares_of(split: str, valid_size: int, test_size: int) -> list[int]:
    """Read ``--split``."""
    words = [word.strip() for word in split.split(",")]
    are_numbers = all(word.isascii() and word.isdecimal() and len(word) < 16 for word in words)
    if len(words) != len(SPLITS) or not are_numbers or not int(words[TRAIN]):
        raise UserError(
            f"--split {shortened(split)}: give three whole numbers, for train, valid and test, the first "
            "above 0, such as 900,50,50"
        )
    if valid_size or test_size:
        raise UserError(f"--split {split} and --val-size or --test-size exclude each other; give one of them")
    return [int(word) for word in words]


@contextmanager
def _no_progress(_: str, __: int) -> Iterator[None]:
    yield


def _write_parts(
    sources: Sequence[RecordSource], folder: Path, options: PrepareOptions, open_progress: OpenProgress
) -> list[Part]:
    total = sum(file.stat().st_size for source in sources for file in source.files())
    workers = options.workers or default_workers()
    with open_progress("read", total) as progress:
        for source in sources:
            source.progress = progress
        # More processes than blocks would have nothing to do.
        workers = min(workers, 1 + total // text.BLOCK_BYTES)
        return write_parts(sources, folder, workers, options.allow_unknown)


@dataclass(frozen=True)
class _HeldOut:
    """Says which records, by position over all inputs, go to which split.

    Attributes:
        records: positions of the held-out records, ascending, int64 [m].
        splits: index into `SPLITS` of each, int64 [m].
        provenance: the manifest's entry about the split.
    """

    records: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int64]
    provenance: dict[str, Any]

    @staticmethod
    def draw(total: int, valid_size: int, test_size: int, seed: int) -> _HeldOut:
        """Draw the splits: the first records of a random order are for validation, the next for test."""
        held_out = valid_size + test_size
        if not held_out:
            nothing = np.zeros(0, dtype=np.int64)
            return _HeldOut(nothing, nothing, {})
        if held_out >= total:
            raise UserError(
                f"--val-size={valid_size} and --test-size={test_size} leave nothing to train on: "
                f"the input has {total} sequences; hold out fewer than that"
            )
        drawn = counter_rng.permute(np.arange(held_out), total, seed, counter_rng.Purpose.SPLIT)
        order = np.argsort(drawn)
        splits = np.where(np.arange(len(drawn)) < valid_size, SPLITS.index("valid"), SPLITS.index("test"))
        provenance = {"seed": seed, "valid_size": valid_size, "test_size": test_size, "total": total}
        return _HeldOut(drawn[order], splits[order], provenance)

    @staticmethod
    def by_position(total: int, shares: Sequence[int]) -> _HeldOut:
        """Take the splits one behind the other, with the rounding of Megatron-LM's ``--split``."""
        borders = [0]
        for share in shares:
            borders.append(borders[-1] + round(Fraction(share * total, sum(shares))))
        # Rounding may leave or take too much, which the first split makes up for.
        excess = borders[-1] - total
        first, second, _ = (max(0, border - excess) for border in borders[1:])
        if not first:
            raise UserError(
                f"--split {','.join(map(str, shares))} leaves nothing to train on: the input has {total} "
                "sequences; give the first a larger share"
            )
        records = np.arange(first, total, dtype=np.int64)
        splits = np.where(records < second, SPLITS.index("valid"), SPLITS.index("test"))
        return _HeldOut(records, splits, {"positions": [first, second, total], "total": total})

    def names(self) -> list[str]:
        """Return the splits that get a record, and always `train`."""
        return [split for index, split in enumerate(SPLITS) if index == TRAIN or index in self.splits]

    def of_records(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the index into `SPLITS` of each of the records `first` to `first + count - 1`, [count]."""
        assigned = np.full(count, TRAIN, dtype=np.int64)
        begin, end = np.searchsorted(self.records, (first, first + count))
        assigned[self.records[begin:end] - first] = self.splits[begin:end]
        return assigned


class _Merger:
    """Puts the records of all parts, in order, into the stores of their splits."""

    def __init__(
        self,
        sources: Sequence[RecordSource],
        parts: Sequence[Part],
        held_out: _HeldOut,
        folder: Path,
        shard_bytes: int,
    ) -> None:
        self._sources, self._parts, self._held_out = sources, parts, held_out
        self._folder, self._shard_bytes = folder, shard_bytes
        self._done = 0

    def run(self, open_progress: OpenProgress) -> dict[str, StoreCounts]:
        """Write a store per split into the folder, and return their counts."""
        shutil.rmtree(self._folder, ignore_errors=True)  # left by an attempt that was killed while merging
        self._folder.mkdir()
        kept = [part for part in self._parts if part.path is not None]
        total = sum(part.residues for part in kept)
        with open_progress("merge", total) as progress, ExitStack() as stack:
            writers = [
                stack.enter_context(StoreWriter(self._folder / name, self._shard_bytes))
                for name in self._held_out.names()
            ]
            by_split = dict(zip(self._held_out.names(), writers, strict=True))
            for part in kept:
                self._add(part, by_split)
                if progress is not None:
                    progress.update(part.residues)
            by_split["train"].counts.dropped_sequences = sum(part.dropped for part in self._parts)
            for name, writer in by_split.items():
                writer.provenance["sources"] = self._provenance()
                writer.provenance["split"] = {"name": name, **self._held_out.provenance}
        return {name: writer.counts for name, writer in by_split.items()}

    def _add(self, part: Part, writers: Mapping[str, StoreWriter]) -> None:
        """Add a part; the counts of held-out records are moved from training to their split."""
        store, lower_case = part.open()
        writers["train"].counts.merge(store.counts)
        for first in range(0, len(store), _MERGED_RECORDS):
            stop = min(first + _MERGED_RECORDS, len(store))
            assigned = self._held_out.of_records(self._done, stop - first)
            for name, writer in writers.items():
                chosen = assigned == SPLITS.index(name)
                if not chosen.any():
                    continue
                tokens = _append(writer, store, first, stop, chosen)
                if name != "train":
                    counts = StoreCounts(
                        sequences=int(chosen.sum()),
                        residues=len(tokens),
                        token_counts=np.bincount(tokens, minlength=len(vocabulary.VOCAB)).tolist(),
                        lower_case_residues=int(lower_case[first:stop][chosen].sum()),
                        unknown_residues=int(np.count_nonzero(tokens == vocabulary.UNK)),
                    )
                    writer.counts.merge(counts)
                    writers["train"].counts.merge(counts, sign=-1)
            self._done += stop - first

    def _provenance(self) -> list[dict[str, object]]:
        """Return name and SHA-256 of every file; the first of an input also has its number of sequences."""
        entries: list[dict[str, object]] = []
        for number, source in enumerate(self._sources):
            sequences = sum(part.sequences for part in self._parts if part.source == number)
            for position, (name, checksum) in enumerate(source.checksums.items()):
                entries.append({"name": name, "sha256": checksum})
                if not position:
                    entries[-1]["sequences"] = sequences
        return entries


def _append(
    writer: StoreWriter, store: TokenStore, first: int, stop: int, chosen: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Copy the chosen ones of the proteins `first` to `stop`, exclusive, and return their tokens.

    Args:
        writer: writer of the split's store.
        store: store of the part.
        first: number of the first protein.
        stop: number behind that of the last protein.
        chosen: which of them to copy, [stop - first].
    """
    lengths, start = store.lengths[first:stop], int(store.starts[first])
    tokens = store.tokens[start : start + int(lengths.sum(dtype=np.int64))]
    ids, id_lengths = store.encoded_ids(first, stop)
    if not chosen.all():
        tokens = tokens[np.repeat(chosen, lengths)]
        ids = np.frombuffer(ids, dtype=np.uint8)[np.repeat(chosen, id_lengths)].tobytes()
        lengths, id_lengths = lengths[chosen], id_lengths[chosen]
    writer.append_encoded(tokens, lengths, ids, id_lengths)
    return tokens
