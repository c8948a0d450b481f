"""Writes a rank's part of a checkpoint in the process that trains, as Megatron-Core does from 0.19 on.

Megatron-Core 0.16 forks two processes for that. A fork of a process that trains costs more than writing the
state of a small model, and is not safe beside the threads of CUDA and gloo.
"""

from __future__ import annotations

import queue
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

# The queue in which the writer reports what it wrote. Saving waits for it, so it stays within this process.
# Megatron-Core's own queue, made for saving in the background, is a further process that imports PyTorch.
filesystem_async._results_queue = queue.SimpleQueue()


class SaveInThisProcess(TorchDistSaveShardedStrategy):
    """Saves in Megatron-Core's distributed format: one file for each rank, written by the rank itself."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(self, writer: Any, *rest: Any) -> Any:
        request = super()._get_save_and_finalize_callbacks(writer, *rest)
        forks = hasattr(writer, "write_preloaded_data_multiproc")
        # Without a function there is nothing that this rank has to write.
        if request.async_fn is None or not forks:
            return request
        return request._replace(async_fn=partial(_write, writer))


def _write(writer: Any, rank: int, buckets: list[Any], results: queue.SimpleQueue[Any]) -> None:
    """Write the only file of this rank; `results` gets what was written, or the exception."""
    (bucket,) = buckets
    written: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # The writer takes one entry out of this queue when it has ended.
    ended: queue.Queue[int] = queue.Queue()
    ended.put(0)
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    writer.write_preloaded_data(transforms, 0, bucket, written, ended, use_fsync=True)
    number, result = written.get()
    results.put(result if isinstance(result, Exception) else {number: result})
