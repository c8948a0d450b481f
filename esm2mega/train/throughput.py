"""Measures time per step and residues per second, without evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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

    def __init__(self, step: int) -> None:
        """Start the clock behind `step` finished steps."""
        self._step = step
        self._began = time.perf_counter()

    def lap(self, step: int, tokens: int, computed_tokens: int, residues: int) -> Lap:
        """Return the means since the last lap, which must have ended at an earlier step.

        Args:
            step: Finished steps.
            tokens: Tokens of proteins since the last lap, ``<cls>`` and ``<eos>`` included, but not those of
                packs that are replaced by padding.
            computed_tokens: Tokens computed since the last lap, padding included.
            residues: Residues since the last lap.
        """
        now = time.perf_counter()
        seconds, steps = now - self._began, step - self._step
        self._began, self._step = now, step
        return Lap(seconds / steps, residues / seconds, tokens / computed_tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began


def sums_over_data_parallel(counts: Sequence[int], device: torch.device) -> list[int]:
    """Return the sums of host numbers over the data-parallel group, valid on every rank."""
    totals = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    return [int(total) for total in totals.tolist()]


def memory_gb(device: torch.device) -> float:
    """Return GB (1e9 bytes): the peak of this rank's tensors on a GPU, or this process's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
