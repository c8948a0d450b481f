"""Encodes the blocks of all inputs in parallel; each finished part is a small token store of its own.

One process reads the inputs from front to back and hands out blocks; the workers parse and encode them. A
part is renamed when it is complete and holds the key of its block, so a later attempt takes it as it is if
the input still has the same block there and no file of the part has changed. Beside its store, a part has a
file with the number of lower-case residues of each record when there are any.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega.data.readers.base import Block, Record, RecordSource
from esm2mega.data.store.intake import check_known, in_batches
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.errors import MachineError, UserError
from esm2mega.files import file_sha256
from esm2mega.processes import follow_parent

MOST_WORKERS = 16
"""More workers would not help: one process reads and hashes the inputs, and cannot feed many more."""

# Residues handed to a writer at once: enough to make the cost per batch negligible, and small in memory.
_BATCH_RESIDUES = 4 << 20
_WAITING_BLOCKS = 2

_LOWER_CASE = "lower_case_sha256"
"""This entry of a part's manifest is the checksum of the file beside it; absent where there is none."""


@dataclass(frozen=True)
class Part:
    """Says what became of one block.

    Attributes:
        path: the part's store; None when no record of the block was kept.
        source: position of the block's input among all inputs.
        sequences: records in the store.
        residues: residues in the store.
        dropped: records that the user asked to drop.
        resumed: whether an earlier attempt had finished the part.
    """

    path: Path | None
    source: int
    sequences: int = 0
    residues: int = 0
    dropped: int = 0
    resumed: bool = False

    def open(self) -> tuple[TokenStore, npt.NDArray[np.int32]]:
        """Open the store; return it and the number of lower-case residues of each record, [n]."""
        assert self.path is not None
        store = TokenStore(self.path, staged=True)
        with suppress(FileNotFoundError):
            return store, np.load(_lower_case_file(self.path))
        return store, np.zeros(len(store), dtype=np.int32)


def default_workers() -> int:
    """Return the number of cores that this process may use, or `MOST_WORKERS` if it is less."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def write_parts(
    sources: Sequence[RecordSource], folder: Path, workers: int, allow_unknown: bool = False
) -> list[Part]:
    """Read all inputs and encode them, but for the parts that an earlier attempt has finished.

    Args:
        sources: the inputs.
        folder: directory of the parts; may hold those of an earlier attempt.
        workers: processes that parse and encode; with 1, this process does it.
        allow_unknown: whether a protein may have unknown residues alone.

    Returns:
        The parts in the order of the input.

    Raises:
        UserError: A record cannot be taken; the error is about the first one in the order of the input.
        MachineError: A worker was killed.
    """
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob(".*"):
        shutil.rmtree(unfinished)
    if workers == 1:
        return [job.run() for job in _jobs(sources, folder, allow_unknown)]
    context = multiprocessing.get_context("spawn")  # the caller may have threads, which a fork would break
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
        try:
            jobs = _jobs(sources, folder, allow_unknown)
            return list(_run(pool, jobs, workers + _WAITING_BLOCKS))
        except BrokenProcessPool:
            # The pool ends the workers that it knows, and would wait for ever for one that was just starting.
            for worker in set(multiprocessing.active_children()) - set(others):
                worker.kill()
            raise MachineError(
                "a worker process was killed or could not start, perhaps for want of memory; the same "
                "command continues with what is finished, and needs less memory with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Job:
    """Holds all that a worker needs: a block, and where its part goes."""

    source: RecordSource
    number: int  # position of the source
    block: Block
    path: Path
    key: str
    allow_unknown: bool

    def run(self) -> Part:
        """Parse, encode and write the block, or take the part that an earlier attempt has made of it."""
        if (part := self._finished()) is not None:
            return part
        shutil.rmtree(self.path, ignore_errors=True)
        _lower_case_file(self.path).unlink(missing_ok=True)
        kept = _Kept(self.source, self.source.records(self.block), self.allow_unknown)
        batches = in_batches(kept, lambda record: len(record.residues), _BATCH_RESIDUES)
        if (first := next(batches, None)) is None:
            return Part(None, self.number, dropped=kept.dropped)
        with StoreWriter(self.path) as writer:
            lower_case = []
            for records in chain([first], batches):
                residues = [record.residues for record in records]
                before = writer.counts.lower_case_residues
                writer.append([record.id for record in records], residues)
                if writer.counts.lower_case_residues == before:
                    lower_case.append(np.zeros(len(residues), dtype=np.int32))
                else:
                    lower_case.append(_lower_case_per_record(residues))
            writer.counts.dropped_sequences = kept.dropped
            writer.provenance["block"] = self.key
            if writer.counts.lower_case_residues:
                with open(_lower_case_file(self.path), "wb") as file:
                    np.save(file, np.concatenate(lower_case))
                    os.fsync(file.fileno())
                writer.provenance[_LOWER_CASE] = file_sha256(_lower_case_file(self.path))
        counts = writer.counts
        return Part(self.path, self.number, counts.sequences, counts.residues, kept.dropped)

    def _finished(self) -> Part | None:
        try:
            store = TokenStore(self.path, staged=True)
            if store.manifest.get("block") != self.key:
                return None
            store.verify()
            lower_case = _lower_case_file(self.path)
            found = file_sha256(lower_case) if store.counts.lower_case_residues else None
        except UserError:
            return None
        if not store.is_sealed or found != store.manifest.get(_LOWER_CASE):
            return None
        counts = store.counts
        return Part(
            self.path, self.number, counts.sequences, counts.residues, counts.dropped_sequences, resumed=True
        )


def _jobs(sources: Sequence[RecordSource], folder: Path, allow_unknown: bool) -> Iterator[_Job]:
    number = 0
    for position, source in enumerate(sources):
        worker = source.for_worker()
        for block in source.blocks():
            path = folder / f"{number:08d}"
            yield _Job(worker, position, block, path, source.key(block), allow_unknown)
            number += 1


def _run(pool: ProcessPoolExecutor, jobs: Iterator[_Job], most: int) -> Iterator[Part]:
    """Yield finished parts in order; at most `most` blocks are in memory."""
    waiting: deque[Future[Part]] = deque()
    try:
        for job in jobs:
            waiting.append(_submit(pool, job))
            if len(waiting) == most:
                yield waiting.popleft().result()
    except UserError:
        # The reading process met an error; the blocks before it may hold an earlier one.
        while waiting:
            yield waiting.popleft().result()
        raise
    while waiting:
        yield waiting.popleft().result()


def _submit(pool: ProcessPoolExecutor, job: _Job) -> Future[Part]:
    """Hand a job to the pool; a worker that this starts never gets Ctrl-C, not even while importing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the worker
    try:
        return pool.submit(_run_job, job)
    except (OSError, ValueError) as error:
        # The system starts no further worker, or the pool broke while it was starting one.
        raise BrokenProcessPool(str(error)) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_job(job: _Job) -> Part:
    return job.run()


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end as soon as the parent has ended, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


class _Kept:
    """Passes records on but those to drop, which it counts; refuses those without a known residue, unless
    they are allowed.
    """

    def __init__(self, source: RecordSource, records: Iterator[Record], allow_unknown: bool) -> None:
        self._source, self._records, self._allow_unknown = source, records, allow_unknown
        self.dropped = 0

    def __iter__(self) -> Iterator[Record]:
        for record in self._records:
            if not record.residues:
                self.dropped += 1
                continue
            if not self._allow_unknown:
                check_known(self._source, record.line, record.id, record.residues)
            yield record


def _lower_case_per_record(residues: Sequence[bytes]) -> npt.NDArray[np.int32]:
    """Count the lower-case residues of each record, [n]."""
    lengths = np.fromiter(map(len, residues), dtype=np.int64, count=len(residues))
    letters = np.frombuffer(b"".join(residues), dtype=np.uint8)
    is_lower = (letters >= ord("a")) & (letters <= ord("z"))
    return np.add.reduceat(is_lower, np.cumsum(lengths) - lengths, dtype=np.int32)


def _lower_case_file(path: Path) -> Path:
    return path.with_suffix(".lower_case.npy")
