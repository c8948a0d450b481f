"""Lists the layouts that a number of processes allows, plans them, and says why the others fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ParallelConfig, Run
from esm2mega.config.validate import validate
from esm2mega.errors import UserError
from esm2mega.model.build import DTYPES
from esm2mega.plan.estimate import LayoutPlan, estimate
from esm2mega.plan.hardware import Hardware
from esm2mega.plan.stage import Device

GB = 2**30
"""Is what a card's 80 GB are counted in."""

RESERVE = 0.06
"""Is left free of a card: for the CUDA context, buffers of the communication, and gaps between tensors."""

_RECOMPUTE = ("none", "selective", "full")
_MOST_STAGES = 16


@dataclass(frozen=True)
class Failed:
    """Holds a layout that cannot run.

    Attributes:
        parallel: The layout.
        reason: Why, in words.
    """

    parallel: ParallelConfig
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Holds the layouts that fit, the fastest first, and those that do not."""

    fitting: Sequence[LayoutPlan]
    failed: Sequence[Failed]


def candidates(run: Run, gpus: int, per_host: int) -> Iterator[ParallelConfig]:
    """Yield layouts for `gpus` processes: tensor parallelism within a host, and at most 16 stages.

    Sequence parallelism and the distributed optimizer are on wherever they save something. Context
    parallelism stays within a host too, and is for proteins that are longer than the part of a pack that it
    gives to a process: packs of shorter ones can be made smaller instead, and are not sent around.
    """
    shape = shape_of(run.model)
    for tp in range(1, min(gpus, per_host) + 1):
        if gpus % tp or shape.num_attention_heads % tp or shape.ffn_hidden_size % tp:
            continue
        for pp in range(1, min(gpus // tp, shape.num_layers, _MOST_STAGES) + 1):
            for cp in _context_sizes(run, gpus, per_host, tp * pp, tp):
                yield replace(
                    run.parallel,
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=None,
                    context_parallel_size=cp,
                    sequence_parallel=tp > 1,
                    distributed_optimizer=gpus > tp * pp,
                )


def _context_sizes(run: Run, gpus: int, per_host: int, others: int, tp: int) -> Iterator[int]:
    tokens, longest = run.train.micro_batch_tokens, run.data.max_seq_length
    for cp in range(1, per_host // tp + 1):
        if gpus % (others * cp) == 0 and (cp == 1 or tokens // cp < longest):
            yield cp


def rank_layouts(
    run: Run, gpus: int, memory_gb: float, device: Device, hardware: Hardware, length: int
) -> Ranking:
    """Plan every candidate, with as much recomputation as it needs to fit and not less than `run` has.

    Args:
        run: The configuration, whose layout is not looked at.
        gpus: Processes of the job.
        memory_gb: Memory of each, in GB of 2^30 bytes.
        device: Where they run.
        hardware: Rates for the time of a step.
        length: Tokens of each protein.
    """
    fitting, failed = [], []
    for parallel in candidates(run, gpus, hardware.per_host):
        outcome = _plan(replace(run, parallel=parallel), gpus, memory_gb, device, hardware, length)
        if isinstance(outcome, Failed):
            failed.append(outcome)
        else:
            fitting.append(outcome)
    fitting.sort(key=lambda plan: -(plan.tokens_per_second or 0.0))
    return Ranking(fitting, failed)


def _plan(
    run: Run, gpus: int, memory_gb: float, device: Device, hardware: Hardware, length: int
) -> LayoutPlan | Failed:
    try:
        validate(run, gpus)
    except UserError as error:
        return Failed(run.parallel, str(error))
    if (least := least_states(run, gpus)) > usable(memory_gb):
        return Failed(
            run.parallel, f"weights, gradients and optimizer alone need {least / GB:.1f} GB or more per GPU"
        )
    for recompute in _RECOMPUTE[_RECOMPUTE.index(run.model.recompute) :]:
        plan = estimate(
            replace(run, model=replace(run.model, recompute=recompute)), gpus, device, hardware, length
        )
        if plan.worst.total <= usable(memory_gb):
            return plan
    return Failed(run.parallel, lack(plan))


def usable(memory_gb: float) -> float:
    """Return the bytes of a card that tensors may take."""
    return memory_gb * GB * (1 - RESERVE)


def lack(plan: LayoutPlan) -> str:
    """Say how much a plan needs that does not fit."""
    worst = plan.worst
    return (
        f"needs {worst.total / GB:.1f} GB per GPU with model.recompute={plan.model.recompute}: "
        f"{worst.states.most / GB:.1f} of weights, gradients and optimizer, "
        f"{worst.activations / GB:.1f} of activations"
    )


def least_states(run: Run, gpus: int) -> float:
    """Return a lower bound of the states of the fullest rank, from the matrices of the layers alone."""
    shape, parallel = shape_of(run.model), run.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    h = shape.hidden_size
    weights = shape.num_layers * (4 * h * h + 2 * h * shape.ffn_hidden_size) / (tp * pp)
    size = DTYPES[run.model.precision].itemsize
    optimizer = (12 if size == 2 else 2 * size) / (gpus // (tp * pp) if parallel.distributed_optimizer else 1)
    return weights * (size + max(4, size) + optimizer)
