"""Starts and ends the process groups: backend, device, Megatron-Core's groups, seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from esm2mega.config.schema import ParallelConfig
from esm2mega.errors import UserError
from esm2mega.parallel import cpu, kernels
from esm2mega.parallel.errors import claim_error_report, come, lost_peer, meeting, missing, no_answer
from esm2mega.parallel.rendezvous import leave, store_of_groups
from esm2mega.parallel.stalled import absent_ranks

_INIT = "init"
"""Names the meeting at which the process groups are made."""


@dataclass(frozen=True)
class Ranks:
    """Holds the ranks of this process in the layout; sizes multiply to `world_size`, ranks count from 0."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this process writes logs, prints and shows progress: only global rank 0 does."""
        return self.rank == 0

    @property
    def is_output_rank(self) -> bool:
        """Return whether this process writes the results of its pipeline stage.

        Tensor- and context-parallel ranks of a stage all have them; the first of these writes.
        """
        return self.tp_rank == 0 and self.cp_rank == 0


@contextmanager
def process_groups(config: ParallelConfig, seed: int) -> Iterator[Ranks]:
    """Build all process groups of a run, yield this process's `Ranks`, and destroy the groups at the end.

    Under torchrun the rendezvous comes from the environment (NCCL with GPUs, gloo without). Without a
    launcher a world of one process is made in memory: no port is opened.

    Args:
        config: Sizes of the tensor, pipeline and context dimensions; that of the data is what remains of the
            world.
        seed: Seed of Megatron-Core's generators. Weights, data and dropout do not use them: they are pure
            functions of the run's seed, see `esm2mega.model.init`, `esm2mega.data.counter_rng` and
            `esm2mega.model.dropout`.
    """
    device = _claim_device()
    if device.type == "cpu":
        cpu.install()
    kernels.install(device)
    timeout = timedelta(minutes=config.timeout_minutes)
    store, rank, world_size = store_of_groups(timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    come(store, _INIT, rank)
    with meeting(timeout, lambda: missing(store, _INIT, range(world_size))):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            # Used as minutes of a timedelta, which need not be whole.
            distributed_timeout_minutes=config.timeout_minutes,
            # Checkpoints of the distributed optimizer are gathered in host memory.
            create_gloo_process_groups=config.distributed_optimizer,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            device=device,
        )
    except BaseException as error:
        lost, absent = lost_peer(error), []
        if lost is not None:
            absent = absent_ranks(store, rank, world_size, "Timed out" in str(error), timeout)
            lost = no_answer(timeout, absent) if absent else lost
        failure = lost or error
        # Which rank reports can only be decided while the process groups still exist; by their store, which
        # does not answer if it is with a rank 0 that does not.
        reports = _reports_without_rank_0(rank) if 0 in absent else claim_error_report()
        failure.claimed_report = reports  # type: ignore[attr-defined]
        if lost is not None:
            raise lost from error
        raise
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        leave()


def _reports_without_rank_0(rank: int) -> bool:
    """Return whether a rank reports that rank 0 does not answer: rank 1, and one for each other host.

    Where the host of rank 0 has fallen silent, so has rank 1 on it.
    """
    return rank == 1 or os.environ.get("LOCAL_RANK") == "0"


def _claim_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine shows {count} CUDA device{'s' * (count > 1)}: start "
            "at most one process per device (--nproc-per-node), or look at CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    # Convolutions of heads round fp32 to TF32 where products do; PyTorch would let them do so by default.
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    return torch.device("cuda", local_rank)
