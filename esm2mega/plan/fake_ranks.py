"""Lets one process be any rank of a job that does not exist: its groups, without other processes.

Tensors are fake: they have shapes and types and no memory, so a rank of any model can be built on a laptop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import esm2mega.model.build
from esm2mega.config.schema import ParallelConfig
from esm2mega.parallel import cpu, kernels

CPU = torch.device("cpu")
"""Is the device that fake tensors say they are on, whatever the job's; so nothing asks for a GPU."""

META = torch.device("meta")
"""Is the device of tensors without values."""


@contextmanager
def fake_rank(parallel: ParallelConfig, world_size: int, rank: int) -> Iterator[None]:
    """Make the process groups of `rank` in a job of `world_size`; no other process is needed.

    Collectives return at once, and leave their results unset.

    Args:
        parallel: Layout.
        world_size: Processes of the job.
        rank: Which of them this one is.
    """
    cpu.install()
    kernels.install(CPU)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Let tensors be fake: models are built of them and run, without values and memory."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for target, name, value in _STAND_INS:
            stack.enter_context(patch.object(target, name, value))
        yield


@contextmanager
def meta_buffers() -> Iterator[None]:
    """Let Megatron-Core allocate its buffers on the meta device, which is faster than fake tensors are."""
    with patch.object(cpu.CudaOnCpu, "current_device", staticmethod(lambda: META)):
        yield


def move_to_meta(module: torch.nn.Module) -> None:
    """Replace fake parameters by those of the meta device, with their marks; tied ones stay tied."""
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if parameter not in moved:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=META)
                moved[parameter] = torch.nn.Parameter(empty)
                moved[parameter].__dict__.update(parameter.__dict__)
            part._parameters[name] = moved[parameter]


def _same(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module


def _gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
    objects[:] = [own] * len(objects)


def _nothing(*args: Any, **kwargs: Any) -> Any:
    return nullcontext()


_STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    # Fake parameters are where they belong, and have no values.
    (torch.nn.Module, "to", _same),
    (dist, "all_gather_object", _gather_object),
    (esm2mega.model.build, "initialize_parameters", _nothing),
    # It compares the states of generators, whose values are not known either.
    (tensor_parallel.random.CudaRNGStatesTracker, "fork", _nothing),
    # Groups of gloo would be real ones, which wait for the other processes.
    (parallel_state, "get_data_parallel_group_gloo", parallel_state.get_data_parallel_group),
    (parallel_state, "get_expert_data_parallel_group_gloo", parallel_state.get_expert_data_parallel_group),
)
