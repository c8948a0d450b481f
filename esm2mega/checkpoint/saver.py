"""Saves checkpoints whole or not at all: at once, or in the background while training goes on.

A save has two halves. `Saver.save` plans it, and writes or begins to write; `Saver.finish` waits until all
ranks have written, and gives the checkpoint its name. Both are called by all ranks together. In the
background, which is a thread of every rank (`save_strategy` says why), a copy of the state is written and
digested: what training does meanwhile is not in it.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from esm2mega.checkpoint import layout, store
from esm2mega.checkpoint.auxiliary import write_auxiliary
from esm2mega.checkpoint.digests import Entries, digest_files, tensor_files
from esm2mega.checkpoint.optimizer_state import places_without_padding
from esm2mega.checkpoint.save_strategy import SaveInThisProcess, SaveQueue
from esm2mega.checkpoint.tensor_filter import ALL, TensorFilter
from esm2mega.config.schema import Run
from esm2mega.errors import MachineError
from esm2mega.parallel.errors import lost_peer

# The exception says what failed too, and becomes the one line that is printed.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)

# Megatron-Core 0.19 asks for the package nvidia-resiliency-ext unless its own writer is named.
_OWN_WRITER = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


_PROBE_BYTES = 1 << 16
"""This is more than the files that rank 0 writes while other ranks wait."""


@dataclass
class _Save:
    """Holds a save that was begun, and what became of this rank's part of it; its thread writes here too."""

    directory: Path
    partial: Path
    then: Callable[[], None]
    describe: Callable[[], None]
    entries: Entries = field(default_factory=dict)
    failure: BaseException | None = None
    is_written: bool = False

    @contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Keep the first failure of the block, which has no collective; all ranks meet in `Saver._agree`."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # PyTorch's is not an `Exception`
            self.failure = self.failure or error

    @contextmanager
    def among_collectives(self) -> Iterator[None]:
        """Let a failure of the block end this rank at once, since other ranks may wait for it there.

        To wait for them in `Saver._agree` would be to wait until the timeout, which reports a lost connection
        instead of the failure. What PyTorch raises on every rank is kept as by `noting_failure`.
        """
        try:
            yield
        except CheckpointException as error:
            self.failure = self.failure or error
        except Exception as error:
            if dist.get_rank() == 0:
                self.remove()
            if lost_peer(error) is not None:
                raise
            raise self.error({dist.get_rank(): store.reason_of(self.failure or error)}) from error

    def remove(self) -> None:
        """Remove what was written; rank 0 calls this."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def error(self, reasons: Mapping[int, str]) -> MachineError:
        """Return the error of a save that failed, from the reasons by rank."""
        rank, reason = next(iter(reasons.items()))
        where = f" (rank {rank})" if dist.get_world_size() > 1 else ""
        is_of_disk = any(known in reason for known in (*store.DISK, "written whole"))
        cure = "; free space or choose another run_dir" if is_of_disk else ""
        return MachineError(f"{self.directory}: not saved: {reason}{where}{cure}")


class Saver:
    """Saves the checkpoints of a run, one after the other."""

    def __init__(self, in_background: bool = False) -> None:
        """Prepare to save.

        Args:
            in_background: Whether `save` returns before all is written. Each rank then holds a copy of what
                it writes in host memory until that is written.
        """
        self._in_background = in_background
        self._queue = SaveQueue(in_background)
        self._running: _Save | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """After an error complete what was begun, if that takes no other rank, which may be anywhere."""
        if kind is not None and dist.get_world_size() == 1:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Return whether this rank is still writing a checkpoint; the answer of other ranks may differ."""
        return self._running is not None and not self._running.is_written

    def save(
        self,
        directory: Path,
        model: Sequence[Any],
        optimizer: MegatronOptimizer,
        run: Run,
        state: dict[str, Any],
        auxiliary: Mapping[str, torch.Tensor] | None = None,
        tensor_filter: TensorFilter = ALL,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to write a checkpoint, and unless saving is in the background finish it.

        A save that is still running is finished before. If any rank fails, nothing is left behind.

        Args:
            directory: ``RUN_DIR/checkpoints/step_XXXXXXXX`` on a file system that all ranks share.
            model: The chunks of this rank, as wrapped for training.
            optimizer: Their optimizer.
            run: The resolved configuration.
            state: JSON values that a resumed run needs; not to be changed afterwards.
            auxiliary: Tensors that are kept without being trained, see `esm2mega.checkpoint.auxiliary`.
            tensor_filter: Chooses the tensors to save; `state` should say where the others are.
            then: Called on every rank once the checkpoint is complete.

        Raises:
            MachineError: The disk is full or a file cannot be written.
        """
        self.finish()
        partial_dir = layout.partial_dir(directory)

        def describe() -> None:
            layout.write_description(partial_dir, run, state)
            write_auxiliary(partial_dir, auxiliary or {})

        save = _Save(directory, partial_dir, then, describe)
        if dist.get_rank() == 0:
            with save.noting_failure():
                shutil.rmtree(partial_dir, ignore_errors=True)
                (partial_dir / layout.MODEL).mkdir(parents=True)
                _try_to_write(partial_dir / layout.MODEL)
        self._agree(save)
        with save.among_collectives():
            request = self._planned(save, model, optimizer, tensor_filter)
        if save.failure is None:
            with save.noting_failure():
                self._queue.schedule_async_request(request)
        self._agree(save)
        self._running = save
        if not self._in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is running, if any, and complete it; all ranks call this together.

        Raises:
            MachineError: Any rank could not write its part; nothing of this checkpoint is left behind.
        """
        save, entries = self._written()
        if save is None:
            return
        if dist.get_rank() == 0:
            with save.noting_failure():
                layout.complete(save.partial, save.directory, entries)
        self._agree(save)
        save.then()

    def discard(self) -> None:
        """Wait for the save that is running, and remove what it wrote; all ranks call this together.

        Raises:
            MachineError: Any rank could not write its part; nothing of this checkpoint is left behind.
        """
        save, _ = self._written()
        if save is not None and dist.get_rank() == 0:
            save.remove()

    def _written(self) -> tuple[_Save | None, Entries]:
        """Wait until all ranks have written the save that is running; return it and the digests of all ranks.

        It is None if no save is running. A rank that could not write its part raises on all ranks.
        """
        save, self._running = self._running, None
        if save is None:
            return None, {}
        with save.among_collectives():
            # Its collectives are over the world, and let every rank learn that one could not write.
            self._queue.maybe_finalize_async_calls(blocking=True, no_dist=True)
        return save, self._agree(save)

    def _planned(
        self, save: _Save, model: Sequence[Any], optimizer: MegatronOptimizer, tensor_filter: TensorFilter
    ) -> AsyncRequest:
        """Collect the state of all ranks, and decide which of them writes what."""
        with places_without_padding(optimizer):
            state_of_ranks = store.sharded_state(model, optimizer, False, tensor_filter)
        request = dist_checkpointing.save(
            state_of_ranks,
            str(save.partial / layout.MODEL),
            SaveInThisProcess(save.noting_failure, self._in_background),
            content_metadata=store.SHARDING,
            async_sharded_save=True,
            **_OWN_WRITER,
        )
        return request._replace(
            async_fn=partial(_work, save, request.async_fn, dist.get_rank()),
            finalize_fns=[partial(_and_meet, save, finalize) for finalize in request.finalize_fns],
        )

    def _agree(self, save: _Save) -> Entries:
        """Return the digests of all ranks; if any rank failed, remove what was written and raise on all.

        An all-gather over the world gives every rank all digests and reasons.
        """
        ranks: list[Any] = [None] * dist.get_world_size()
        reason = None if save.failure is None else store.reason_of(save.failure)
        dist.all_gather_object(ranks, (reason, save.entries))
        reasons = {rank: reason for rank, (reason, _) in enumerate(ranks) if reason is not None}
        if not reasons:
            return {name: entry for _, entries in ranks for name, entry in entries.items()}
        # A thread that still writes would make files anew where they are removed.
        self._queue.abandon()
        dist.barrier()
        if dist.get_rank() == 0:
            save.remove()
        raise save.error(reasons) from save.failure


def _try_to_write(folder: Path) -> None:
    """Write a file and remove it, while no rank waits for another yet.

    Megatron-Core has rank 0 write a small file on the way to a collective. An error there, where the disk is
    full or may not be written to, would leave the other ranks in it until the timeout.
    """
    file = folder / "probe"
    with file.open("wb") as stream:
        stream.write(bytes(_PROBE_BYTES))
    file.unlink()


def remove_partial(run_dir: str | Path) -> None:
    """Remove the checkpoints that a killed process had begun; only who owns `run_dir` calls this."""
    for path in layout.checkpoints_dir(run_dir).glob("step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _work(save: _Save, write: Callable[..., None] | None, rank: int, *arguments: Any) -> None:
    """Write and digest this rank's part, and on rank 0 what describes the checkpoint; a thread may run it."""
    with save.noting_failure():
        if write is not None:
            write(*arguments)
        if rank == 0:
            save.describe()
        save.entries = digest_files(save.partial, tensor_files(save.partial, rank))
    save.is_written = True


def _and_meet(save: _Save, finalize: Callable[[], None]) -> None:
    """Run a finalising function of Megatron-Core, also to its barrier if rank 0 could not write its file."""
    try:
        finalize()
    except OSError as error:
        save.failure = error
        dist.barrier()
