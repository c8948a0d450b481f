"""Writes a rank's part of a checkpoint in the process that trains: at once, or in a thread beside training.

Megatron-Core 0.16 forks two processes for every save, and 0.19 one for a save in the background. A fork of a
process that trains is not safe beside the threads of CUDA and gloo, costs more than writing the state of a
small model, and can outlive its parent. A thread starts at once and ends with its process, and most of its
work, writing and hashing, runs outside of Python's global lock.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from esm2mega.processes import yield_processors

# Each save has a queue of its own for what it wrote. Unless there is one here, Megatron-Core makes one for
# all saves, which is a further process that imports PyTorch.
filesystem_async._results_queue = queue.SimpleQueue()


class SaveInThisProcess(TorchDistSaveShardedStrategy):
    """Saves in Megatron-Core's distributed format: one file for each rank, written by the rank itself."""

    def __init__(
        self, noting_failure: Callable[[], AbstractContextManager[None]], in_background: bool = False
    ) -> None:
        """Prepare to save.

        Args:
            noting_failure: Makes a context in which one rank writes the index of the tensors. It keeps what
                fails, since the other ranks wait in a collective behind it, which must be reached.
            in_background: Whether training goes on, so that tensors in host memory are copied before.
        """
        super().__init__("torch_dist", 1, thread_count=1)
        self._copies = in_background
        self._live: set[int] = set()
        self._noting_failure = noting_failure

    def async_save(self, sharded_state_dict: Any, *rest: Any, **options: Any) -> Any:
        entries = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        self._live = {_storage(entry.data) for entry in entries if entry.data is not None}
        return super().async_save(sharded_state_dict, *rest, **options)

    def _get_save_and_finalize_callbacks(self, writer: Any, *rest: Any) -> Any:
        request = super()._get_save_and_finalize_callbacks(writer, *rest)
        writer.finish = partial(self._finish, writer.finish)
        # Without a function there is nothing that this rank has to write.
        if request.async_fn is None:
            return request
        rank, buckets, _ = request.async_fn_args
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        writer.results_queue = results
        preload = partial(_preload, request.preload_fn, self._live) if self._copies else request.preload_fn
        return request._replace(
            async_fn=partial(_write, writer), async_fn_args=[rank, buckets, results], preload_fn=preload
        )

    def _finish(self, finish: Callable[..., None], *arguments: Any) -> None:
        with self._noting_failure():
            finish(*arguments)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _preload(preload: Callable[[], list[Any]], live: set[int]) -> list[Any]:
    """Return what will be written, in host memory and apart from what training changes.

    Tensors of a GPU have been copied by Megatron-Core, as have parts of larger tensors.
    """
    return [
        (path, key, (values, [(item, t.clone() if _storage(t) in live else t) for item, t in tensors]))
        for path, key, (values, tensors) in preload()
    ]


def _write(writer: Any, rank: int, buckets: list[Any], results: queue.SimpleQueue[Any]) -> None:
    """Write the only file of this rank; `results` gets what was written, or the exception."""
    (bucket,) = buckets
    written: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # The writer takes one entry out of this queue when it has ended.
    ended: queue.Queue[int] = queue.Queue()
    ended.put(0)
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    # Megatron-Core switches garbage collection off around it, for a process that shares tensors of a GPU with
    # its parent; here that would be the collection of the training.
    write = inspect.unwrap(writer.write_preloaded_data)
    write(transforms, 0, bucket, written, ended, use_fsync=True)
    number, result = written.get()
    results.put(result if isinstance(result, Exception) else {number: result})


class InThisProcess(AsyncCaller):
    """Runs what a save has to write, in a thread or at once; Megatron-Core's callers start processes."""

    def __init__(self, in_background: bool) -> None:
        self._in_background = in_background
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy what is written, and begin to write it; the function of the request raises nothing."""
        arguments = list(async_req.async_fn_args)
        if async_req.preload_fn is not None:
            arguments[1] = async_req.preload_fn()
        if not self._in_background:
            async_req.async_fn(*arguments)
            return
        # Not a daemon, which would be torn out of PyTorch's writer when the interpreter ends after an error.
        self._thread = threading.Thread(
            target=_run_behind, args=(async_req.async_fn, arguments), name="esm2mega-save"
        )
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Tell whether this rank has written; with `blocking` wait for it. There is no collective here."""
        if blocking:
            self.close()
        return self._thread is None or not self._thread.is_alive()

    def close(self, abort: bool = False) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()

    def __del__(self) -> None:
        """Do nothing, where the base class raises."""


class SaveQueue(AsyncCallsQueue):
    """Is Megatron-Core's queue of saves, with `InThisProcess` as the one that runs them."""

    def __init__(self, in_background: bool) -> None:
        super().__init__()
        self._in_background = in_background

    def _get_async_caller(self) -> AsyncCaller:
        return InThisProcess(self._in_background)

    def abandon(self) -> None:
        """Wait until nothing is being written any more, and forget what was; there is no collective here."""
        while self.async_calls:
            self.async_calls.popleft().async_caller.close()


def _run_behind(function: Callable[..., None], arguments: list[Any]) -> None:
    """Run a function in this thread with less right to the processors than the other threads have."""
    yield_processors()
    function(*arguments)
