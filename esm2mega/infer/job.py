"""Grows one output: one process prepares it, all compute it, and one finishes it, also after kills.

A `Job` says what is computed, and how it is stored.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from esm2mega.config.schema import Run
from esm2mega.data.readers.settings import options_of
from esm2mega.data.readers.streams import spooled
from esm2mega.data.store.cache import open_store
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.store.verification import verify
from esm2mega.errors import UserError
from esm2mega.infer.arrays import WrittenRows
from esm2mega.infer.contents import Contents, Write
from esm2mega.infer.target import Mode, OutputTarget
from esm2mega.infer.work import Journal, Work, differing, has_begun
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.report.progress import Progress
from esm2mega.version import __version__
from esm2mega.vocabulary import TOKENIZER_HASH

_PREPARED = "prepared"
_IDS_AT_ONCE = 1 << 16

Compute = Callable[[int], Iterator[tuple[int, Iterable[Write]]]]
"""Computes a piece, and yields how much is done, in the unit of the job, and what this rank has of it."""


class Job(ABC):
    """Says what a command computes of proteins, and where it stores the results.

    Attributes:
        name: Name of the command, for messages and the progress bar.
        unit: Unit in which `Contents.amount` counts.
        allow_unknown: Whether a protein may have unknown residues alone.
        input: Sequences in any format of `esm2mega.data.readers.sources`, a stream of them, or a token store.
        mode: What to do about an output that exists already.
        run: The configuration.
        target: Where the output goes.
        computing: Says how the model computes, once `load` has loaded it.
    """

    name: str
    unit: str
    allow_unknown = False
    computing = ""

    def __init__(self, input: str, mode: Mode, run: Run, target: OutputTarget) -> None:
        """Set the attributes of the job."""
        self.input, self.mode, self.run, self.target = input, mode, run, target

    @abstractmethod
    def check(self, store: TokenStore) -> None:
        """Raise `UserError` for proteins that cannot be computed; called by one process."""

    @abstractmethod
    def checksum(self) -> str:
        """Return the SHA-256 over the weights, which is the same for every layout; called by one process."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the content of the output; called by one process."""

    @abstractmethod
    def contents(self, store: TokenStore, attributes: dict[str, Any]) -> Contents:
        """Return the contents of the output."""

    @abstractmethod
    def load(self, contents: Any, ranks: Ranks) -> Compute:
        """Load the model, set `computing`, and return the function that computes pieces with the model.

        Args:
            contents: The contents, from `contents`.
            ranks: Ranks of this process.
        """

    @abstractmethod
    def report(self, contents: Any, made: Sequence[Path]) -> list[str]:
        """Return a report for the reader, line by line.

        Args:
            contents: The contents, from `contents`.
            made: The files that were written.
        """


def run_job(job: Job) -> list[str]:
    """Compute and write the output; all ranks call this together.

    Returns:
        A report for the reader, the same on every rank.

    Raises:
        UserError: The input or the settings are not valid, or the output exists already.
    """
    _check_existing(job)
    goes_on = job.mode == "resume" and has_begun(job.target)
    with process_groups(job.run.parallel, job.run.seed) as ranks:
        begun = on_one_rank(lambda: _begin(job))
        if isinstance(begun, str):
            return [begun]
        attributes, store_path, remaining = begun
        contents = job.contents(TokenStore(store_path), attributes)
        work = Work(job.target, contents)
        try:
            _compute(job, work, ranks, remaining[ranks.dp_rank :: ranks.dp_size])
        except UserError:
            # Refused when the model was loaded, or in the first piece: there is nothing to resume yet.
            if ranks.is_main and not goes_on and not work.has_finished:
                shutil.rmtree(work.folder, ignore_errors=True)
            raise
        dist.barrier()
        made = on_one_rank(work.finish)
        return [*job.report(contents, made), job.computing]


def _check_existing(job: Job) -> None:
    """Refuse to touch an output that exists, unless the mode allows it, and any folder of another program."""
    target, mode = job.target, job.mode
    for path in target.existing():
        if path.is_dir() and any(path.iterdir()) and not target.attributes(path):
            raise UserError(f"{path}: is a folder that `{job.name}` did not write; choose another --out")
        if mode == "new":
            raise UserError(f"{path}: exists; replace it with --overwrite, or choose another --out")
    if mode == "new" and has_begun(target):
        raise UserError(
            f"{target.work_dir}: an unfinished output of an earlier start; continue with --resume, or "
            "begin again with --overwrite"
        )


def _begin(job: Job) -> tuple[dict[str, Any], Path, list[int]] | str:
    """Prepare everything that the processes share; one process calls this.

    Returns:
        The attributes, the path of the token store and the pieces to compute; or a line that says why there
        is nothing to do.
    """
    target = job.target
    begun = has_begun(target)
    if not begun or job.mode == "overwrite":
        if target.work_dir.exists():
            shutil.rmtree(target.work_dir)
        make_folder(target.work_dir, f"--out {target.out}")
    try:
        store = _open_input(job)
        verify([store])
        job.check(store)
        attributes = _attributes(job, store)
        if job.mode == "resume" and (finished := target.existing()) and not begun:
            earlier = target.attributes(finished[0])
            if not earlier:
                raise UserError(
                    f"{finished[0]}: exists and does not record its settings; replace it with --overwrite"
                )
            if differences := differing(earlier, attributes):
                raise UserError(
                    f"{finished[0]}: exists and is of other settings: {differences}; replace it with "
                    "--overwrite"
                )
            for path in finished:
                target.verify(path)
            shutil.rmtree(target.work_dir)
            return f"{finished[0]} is complete"
        return attributes, store.path, Work(target, job.contents(store, attributes)).begin()
    except BaseException:
        if not begun:
            shutil.rmtree(target.work_dir, ignore_errors=True)
        raise


def _open_input(job: Job) -> TokenStore:
    """Open the proteins of the input, which are prepared beside the output; a stream is read to its end."""
    run = job.run
    run.data.cache_dir = str(job.target.work_dir / _PREPARED)
    with spooled([job.input], options_of(run.data).sequence_column) as files:
        return open_store(
            str(files.paths[0]),
            run.data,
            None,
            "input",
            allow_unknown=job.allow_unknown,
            shown=files.shown,
        )


def make_folder(path: Path, named: str) -> None:
    """Make a folder.

    Args:
        path: The folder.
        named: Option and path as the user gave them, for the message.

    Raises:
        UserError: The folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{named}: cannot be written: {error.strerror or error}; choose another path"
        ) from error


def refuse_long(store: TokenStore, most: int, name: str, cure: str) -> None:
    """Refuse proteins that are longer than the model sees at once.

    Args:
        store: The proteins.
        most: Residues of the longest one that fits.
        name: Name of the input.
        cure: What the user may do, besides raising the length.

    Raises:
        UserError: A protein is longer than that.
    """
    too_long: npt.NDArray[np.int64] = np.flatnonzero(store.lengths > most)
    if not len(too_long):
        return
    first = int(too_long[0])
    others = f" and {len(too_long) - 1:,} others" if len(too_long) > 1 else ""
    raise UserError(
        f"{name}: {store.id(first)!r} (number {first + 1:,}) has {store.lengths[first]:,} residues{others}, "
        f"more than the {most:,} that the model sees at once; {cure}, or raise --max-seq-length"
    )


def _attributes(job: Job, store: TokenStore) -> dict[str, Any]:
    """Return everything that decides the content of the output."""
    ids = hashlib.sha256()
    for first in range(0, len(store), _IDS_AT_ONCE):
        text, lengths = store.encoded_ids(first, min(first + _IDS_AT_ONCE, len(store)))
        ids.update(text + lengths.tobytes())
    return {
        "esm2mega_version": __version__,
        "model_hash": job.checksum(),
        "tokenizer_hash": TOKENIZER_HASH,
        "sequences_hash": store.fingerprint,
        "ids_hash": ids.hexdigest(),
        **job.settings(),
    }


def _compute(job: Job, work: Work, ranks: Ranks, pieces: Sequence[int]) -> None:
    """Compute and write this rank's share of the pieces."""
    compute = job.load(work.contents, ranks)
    # Pipeline stages write their own.
    writes = ranks.is_output_rank
    total = sum(map(work.contents.amount, pieces))
    with (
        work.open_arrays() as arrays,
        Progress(total, job.name, job.unit, enabled=ranks.is_main) as progress,
    ):
        journal = Journal(work.folder, ranks.rank, arrays)
        for piece in pieces:
            written = WrittenRows()
            for done, found in compute(piece):
                if writes:
                    for name, row, rows in found:
                        arrays.write(name, row, rows)
                        written.add(name, row, row + len(rows))
                progress.update(done)
            if ranks.pp_size > 1:
                # A piece is done when every stage has written its layers.
                arrays.sync()
                written = _of_all_stages(written)
            if writes and ranks.pp_rank == 0:
                journal.add(piece, written)
        journal.flush()


def _of_all_stages(written: WrittenRows) -> WrittenRows:
    """Return the rows that all ranks of this model have written; each of them gets them.

    The ranks are those of the model-parallel group, which meet here.
    """
    group = _model_group()
    parts: list[WrittenRows | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, written, group=group)
    return WrittenRows.joined(part for part in parts if part is not None)


def _model_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_model_parallel_group()
