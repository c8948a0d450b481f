"""Measures time per step and residues per second, without evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Lap:
    """Holds means over the steps since the previous lap.

    Attributes:
        step_time: Seconds per step.
        tokens_per_second: Residues per second over all ranks, without padding, ``<cls>`` and ``<eos>``.
        pack_fill: Real tokens divided by computed tokens, between 0 and 1.
    """

    step_time: float
    tokens_per_second: float
    pack_fill: float


class Throughput:
    """Measures the time of training, with a clock that can be paused while the loop does something else."""

    def __init__(self, step: int, consumed_tokens: int) -> None:
        """Start the clock.

        Args:
            step: Finished steps at the start.
            consumed_tokens: Tokens consumed at the start, ``<cls>`` and ``<eos>`` included.
        """
        self._step, self._tokens = step, consumed_tokens
        self._began = time.perf_counter()

    def lap(self, step: int, consumed_tokens: int, computed_tokens: int, residues: int) -> Lap:
        """Return the means since the last lap, which must have ended at an earlier step.

        Args:
            step: Finished steps.
            consumed_tokens: Tokens consumed up to now, ``<cls>`` and ``<eos>`` included.
            computed_tokens: Tokens computed since the last lap, padding included.
            residues: Residues since the last lap.
        """
        now = time.perf_counter()
        seconds, steps, tokens = now - self._began, step - self._step, consumed_tokens - self._tokens
        self._began, self._step, self._tokens = now, step, consumed_tokens
        return Lap(seconds / steps, residues / seconds, tokens / computed_tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began


def sum_over_data_parallel(count: int, device: torch.device) -> int:
    """Return the sum of a host number over the data-parallel group, valid on every rank."""
    total = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return int(total.item())


def memory_gb(device: torch.device) -> float:
    """Return GB (1e9 bytes): the peak of this rank's tensors on a GPU, or this process's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
