"""A CUDA device that computes nothing: tensors have shapes, types and a device, but no values.

The code that runs on a GPU runs here in full, backward pass and optimizer included, and what it asks of the
device is counted. It needs a process of its own, in which Megatron-Core is not adapted to the CPU yet, and a
C++ compiler, since PyTorch's autograd asks for a device in C++.
"""

from __future__ import annotations

import ctypes
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def compile_stand_in(library: Path) -> None:
    """Compile ``stand_in.cpp``."""
    torch_folder = Path(torch.__file__).parent
    source = Path(__file__).with_name("stand_in.cpp")
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", source, "-o", library]
        + [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"],
        check=True,
    )


class _FakeMode(FakeTensorMode):
    avoid_device_init = True


class Watch(TorchDispatchMode):
    """Counts operations, transfers between host and device, and where the host waits for the device.

    Attributes:
        operations: Calls by name of the operation; views and questions about tensors are not among them.
        transfers: Calls by direction and place, of copies that the host does not wait for.
        waits: Calls by kind and place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def wait(self, kind: str) -> None:
        self.waits[f"{kind} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and torch.is_inference_mode_enabled() and _is_composite(func):
            # Elsewhere autograd has taken `to` and `item` apart before they come here.
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            if args[0].is_cuda:
                self.wait("item")
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.c10d.allreduce_coalesced_.default:
            # PyTorch has no fake form of it; the result is that of one process.
            tensors, group, operation, *rest = args
            return torch.ops.c10d.allreduce_(tensors[:1], group, operation, None, *rest)[1]
        if func.namespace == "aten" and func is not aten.detach.default and not func.is_view:
            self.operations[str(func)] += 1
        if func is aten._to_copy.default and "device" in kwargs:
            self._copied(args[0].device, torch.device(kwargs["device"]), kwargs.get("non_blocking", False))
        if func is aten.copy_.default:
            self._copied(args[1].device, args[0].device, len(args) > 2 and args[2])
        return func(*args, **kwargs)

    def _copied(self, source: torch.device, target: torch.device, non_blocking: bool) -> None:
        if source.type == target.type:
            return
        way = f"{source.type} to {target.type}"
        if non_blocking:
            self.transfers[f"{way} at {_place()}"] += 1
        else:
            self.wait(way)


def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _place() -> str:
    """The innermost line of the package, of Megatron-Core or of a test."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if frame.filename != __file__ and {"esm2mega", "megatron", "tests"} & set(parts[-5:]):
            return f"{'/'.join(parts[-2:])}: {frame.line}"
    return "elsewhere"


@contextmanager
def fake_cuda(stand_in: Path, processes: int = 1) -> Iterator[Watch]:
    """Let everything in the block run on a CUDA device that computes nothing, as the first of some
    processes; the others are not there, and collectives return at once."""
    ctypes.CDLL(str(stand_in))
    watch, start_groups = Watch(), dist.init_process_group

    class Event:
        def record(self) -> None: ...

        def synchronize(self) -> None:
            watch.wait("event")

    def start(backend: str, store: object, rank: int, world_size: int, timeout: object) -> None:
        start_groups("fake", store=FakeStore(), rank=rank, world_size=processes)

    def no_state(*device: object, **form: object) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def gather(results: list[object], value: object, group: object = None) -> None:
        results[:] = [value] * len(results)

    generators = "megatron.core.tensor_parallel.random."
    with ExitStack() as stack:
        for name, answer in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_capability": lambda device=None: (9, 0),
            "manual_seed": lambda seed: None,
            "get_rng_state": no_state,
            "synchronize": lambda device=None: watch.wait("synchronize"),
            "Event": Event,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch(f"{generators}_get_cuda_rng_state", no_state))
        stack.enter_context(patch(f"{generators}_set_cuda_rng_state", lambda *args, **kwargs: None))
        stack.enter_context(patch.object(dist, "init_process_group", start))
        stack.enter_context(patch.object(dist, "all_gather_object", gather))
        # Fake parameters cannot be exchanged in place; those of a GPU are made there.
        stack.enter_context(patch.object(torch.nn.Module, "to", lambda module, device: module))
        stack.enter_context(_FakeMode(allow_non_fake_inputs=True))
        yield stack.enter_context(watch)
