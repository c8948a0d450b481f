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
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.data.overlap import find_overlap
from esm2mega.data.readers import text
from esm2mega.data.readers.base import ByteProgress, RecordSource, SourceOptions
from esm2mega.data.readers.sources import open_source
from esm2mega.data.readers.streams import spooled
from esm2mega.data.store.manifest import StoreCounts
from esm2mega.data.store.parts import Part, default_workers, write_parts
from esm2mega.data.store.refined import RefinedFasta
from esm2mega.data.store.shards import SHARD_BYTES, SHARD_UNIT
from esm2mega.data.store.splits import (
    LEFT_OUT,
    SPLITS,
    DrawnSplits,
    GivenSplits,
    PositionalSplits,
    Splits,
    shares_of,
)
from esm2mega.data.store.staging import check_new, staging_directory
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.errors import MachineError, UserError
from esm2mega.files import real_path

OpenProgress = Callable[[str, int], AbstractContextManager[ByteProgress | None]]
"""This shows the progress of a stage, given its name and the number of bytes to go through."""

_NOTHING: Mapping[str, str | Path] = MappingProxyType({})

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
        refined: FASTA of pieces to write besides; None for none.
    """

    source: SourceOptions = SourceOptions()
    workers: int | None = None
    shard_bytes: int = SHARD_BYTES
    allow_unknown: bool = False
    refined: RefinedFasta | None = None


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
    given: Mapping[str, str | Path] = _NOTHING,
    shares: str | None = None,
) -> PrepareReport:
    """Write `out/train` and, for sizes above 0 or files, `out/valid` and `out/test`.

    The held-out proteins are drawn at random without replacement, and depend only on `seed` and on the number
    of sequences; or the splits lie one behind the other in the input. A sequence that the input repeats may
    be in several splits, which a note says. Proteins of files given for validation and test are left out of
    the training store. Every split keeps the order of its input.

    Args:
        inputs: files in any format of `sources`, or streams, read in this order.
        out: directory to create.
        valid_size: sequences held out for validation.
        test_size: sequences held out for the final test.
        seed: seed of the split.
        options: how to read, number of processes, size of files.
        open_progress: shows the progress of each stage.
        given: files of the splits ``valid`` and ``test``, in any format of `sources`, instead of sizes.
        shares: sizes of the splits that lie one behind the other, such as ``900,50,50``, instead of a draw.
            They are exact if they add up to the number of sequences.

    Returns:
        The counts of each split, and notes for the user.
    """
    out = Path(out)
    _check_arguments(inputs, given, out, valid_size, test_size, options)
    numbers = None if shares is None else shares_of(shares)
    if shares is not None and (valid_size or test_size or given):
        raise UserError(
            f"--split {shares} and --val-size, --test-size, --valid or --test exclude each other; give one"
        )
    with spooled([*inputs, *given.values()], options.source.sequence_column) as files:
        sources = [open_source(path, options.source) for path in files.paths]

        def split(parts: Sequence[Part]) -> Splits:
            if given:
                names = {name: Path(path).name for name, path in given.items()}
                return GivenSplits(len(inputs), names, parts)
            total = sum(part.sequences for part in parts)
            if numbers is not None:
                return PositionalSplits(total, numbers)
            return DrawnSplits(total, valid_size, test_size, seed)

        report = _prepare(sources, out, split, options, open_progress or _no_progress)
        return replace(report, notes=[files.shown(note) for note in report.notes])


def _prepare(
    sources: Sequence[RecordSource],
    out: Path,
    split: Callable[[Sequence[Part]], Splits],
    options: PrepareOptions,
    open_progress: OpenProgress,
) -> PrepareReport:
    """Write the stores of opened sources; `split` makes the splits of the parts that these become."""
    with staging_directory(out) as staging:
        try:
            parts = _write_parts(sources, staging / "parts", options, open_progress)
            splits = split(parts)
            merger = _Merger(sources, parts, splits, staging / "out", options.shard_bytes)
            counts = merger.run(open_progress)
            written = [] if options.refined is None else [options.refined.write(sources)]
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
    return PrepareReport(out, counts, [*notes, *splits.notes(out), *written, *_repeats(out, splits)])


def _repeats(out: Path, splits: Splits) -> list[str]:
    """Return a line for each two splits that share proteins."""
    stores = [TokenStore(out / split) for split in splits.names()]
    return [
        f"{store.path}: {found.count:,} of {len(store):,} sequences are also in {other.path}, since "
        f"{splits.cause}; the first is {store.id(found.row)!r}. Training refuses such splits: prepare "
        f"them again {splits.cure}, or train with data.allow_overlap=true"
        for other, store in combinations(stores, 2)
        if (found := find_overlap(store, other)) is not None
    ]


def _check_arguments(
    inputs: Sequence[str | Path],
    given: Mapping[str, str | Path],
    out: Path,
    valid_size: int,
    test_size: int,
    options: PrepareOptions,
) -> None:
    if not inputs:
        raise UserError("no input: name at least one file of sequences")
    resolved = [real_path(path) for path in inputs]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise UserError(f"{inputs[position]}: given twice; name each file once")
    _check_given(inputs, given, is_drawn=bool(valid_size or test_size))
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
    if options.refined is not None:
        if given:
            raise UserError(
                f"--refined writes the pieces of all proteins, those of --{next(iter(given))} too; write it "
                "in a command without --valid and --test"
            )
        options.refined.check()


def _check_given(inputs: Sequence[str | Path], given: Mapping[str, str | Path], is_drawn: bool) -> None:
    """Refuse files of splits beside sizes, and one file for two purposes."""
    if given and is_drawn:
        raise UserError(
            f"--{next(iter(given))} names a file of held-out sequences, --val-size and --test-size draw them "
            "from the input; give one or the other"
        )
    purposes = {real_path(path): "an input" for path in inputs}
    for name, path in given.items():
        if (other := purposes.setdefault(real_path(path), f"--{name}")) != f"--{name}":
            raise UserError(f"{path}: given both as {other} and as --{name}; each has a file of its own")


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


class _Merger:
    """Puts the records of all parts, in order, into the stores of their splits."""

    def __init__(
        self,
        sources: Sequence[RecordSource],
        parts: Sequence[Part],
        splits: Splits,
        folder: Path,
        shard_bytes: int,
    ) -> None:
        self._sources, self._parts, self._splits = sources, parts, splits
        self._folder, self._shard_bytes = folder, shard_bytes
        self._done = 0

    def run(self, open_progress: OpenProgress) -> dict[str, StoreCounts]:
        """Write a store per split into the folder, and return their counts."""
        shutil.rmtree(self._folder, ignore_errors=True)  # left by an attempt that was killed while merging
        self._folder.mkdir()
        kept = [part for part in self._parts if part.path is not None]
        total = sum(part.residues for part in kept)
        with open_progress("merge", total) as progress, ExitStack() as stack:
            writers = {
                name: stack.enter_context(StoreWriter(self._folder / name, self._shard_bytes))
                for name in self._splits.names()
            }
            for part in kept:
                self._add(part, writers)
                if progress is not None:
                    progress.update(part.residues)
            for part in self._parts:
                if part.path is None:
                    writers[self._splits.of_source(part.source)].counts.dropped_sequences += part.dropped
            self._splits.check(writers["train"].counts.sequences)
            for name, writer in writers.items():
                writer.provenance["sources"] = self._provenance(name)
                writer.provenance["split"] = {"name": name, **self._splits.provenance()}
        return {name: writer.counts for name, writer in writers.items()}

    def _add(self, part: Part, writers: Mapping[str, StoreWriter]) -> None:
        """Add a part; the counts of records that do not go to its own split are moved from there."""
        store, lower_case = part.open()
        own = self._splits.of_source(part.source)
        writers[own].counts.merge(store.counts)
        for first in range(0, len(store), _MERGED_RECORDS):
            rows = range(first, min(first + _MERGED_RECORDS, len(store)))
            assigned = self._splits.assign(part, store, rows, self._done)
            for split in np.unique(assigned).tolist():
                chosen = assigned == split
                tokens, lengths, ids, id_lengths = _chosen(store, rows, chosen)
                if split != LEFT_OUT:
                    writers[SPLITS[split]].append_encoded(tokens, lengths, ids, id_lengths)
                if split == SPLITS.index(own):
                    continue
                counts = StoreCounts(
                    sequences=int(chosen.sum()),
                    residues=len(tokens),
                    token_counts=np.bincount(tokens, minlength=len(vocabulary.VOCAB)).tolist(),
                    lower_case_residues=int(lower_case[first : rows.stop][chosen].sum()),
                    unknown_residues=int(np.count_nonzero(tokens == vocabulary.UNK)),
                )
                writers[own].counts.merge(counts, sign=-1)
                if split == LEFT_OUT:
                    writers[own].counts.dropped_sequences += counts.sequences
                else:
                    writers[SPLITS[split]].counts.merge(counts)
            self._done += len(rows)

    def _provenance(self, split: str) -> list[dict[str, object]]:
        """Return name and SHA-256 of every file that a split is taken from.

        The first file of an input also has the number of its sequences.
        """
        entries: list[dict[str, object]] = []
        for number, source in enumerate(self._sources):
            if not self._splits.is_from(split, number):
                continue
            sequences = sum(part.sequences for part in self._parts if part.source == number)
            for position, (name, checksum) in enumerate(source.checksums.items()):
                entries.append({"name": name, "sha256": checksum})
                if not position:
                    entries[-1]["sequences"] = sequences
        return entries


def _chosen(
    store: TokenStore, rows: range, chosen: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], bytes, npt.NDArray[np.int32]]:
    """Return the chosen ones of some proteins as `StoreWriter.append_encoded` takes them.

    Args:
        store: store of the part.
        rows: numbers of the proteins.
        chosen: which of them to copy, [len(rows)].
    """
    lengths, start = store.lengths[rows.start : rows.stop], int(store.starts[rows.start])
    tokens = store.tokens[start : start + int(lengths.sum(dtype=np.int64))]
    ids, id_lengths = store.encoded_ids(rows.start, rows.stop)
    if not chosen.all():
        tokens = tokens[np.repeat(chosen, lengths)]
        ids = np.frombuffer(ids, dtype=np.uint8)[np.repeat(chosen, id_lengths)].tobytes()
        lengths, id_lengths = lengths[chosen], id_lengths[chosen]
    return tokens, lengths, ids, id_lengths
