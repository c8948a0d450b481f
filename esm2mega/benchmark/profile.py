"""Says which operations work spends its time in: kernels on a GPU, operators of PyTorch on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from esm2mega.benchmark.machine import device, synchronize


@dataclass(frozen=True)
class Operation:
    """Holds one kind of operation.

    Attributes:
        name: As the profiler calls it.
        calls: How often it ran.
        seconds: Its own time, without that of operations that it calls.
    """

    name: str
    calls: int
    seconds: float


def operations_of(work: Callable[[], object]) -> list[Operation]:
    """Do the work under PyTorch's profiler, and return its operations, the longest first."""
    on_gpu = device().type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with record(activities=activities) as recorded:
        work()
        synchronize()
    found = [
        # The profiler counts in microseconds.
        Operation(e.key, e.count, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6)
        for e in recorded.key_averages()
        # An annotation spans kernels, which would count twice.
        if e.device_type == kind and not getattr(e, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda operation: -operation.seconds)
