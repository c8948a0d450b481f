"""Measures one pipeline stage on fake tensors: bytes of its states, exact, and the cost of a micro-batch.

Legend: ``T`` tokens of a pack, ``h`` hidden size, ``t`` tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

import esm2mega.model.build
from esm2mega.batch import PackedBatch
from esm2mega.config.batches import processes_of_a_replica, shares_of_a_pack
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.model.attention import KERNELS, choose_kernel
from esm2mega.model.build import DTYPES, build_model
from esm2mega.model.packed import PackedSequences
from esm2mega.model.pipeline_split import LABELLED_SHARE
from esm2mega.plan.counting import Cost, StepCounter
from esm2mega.plan.fake_ranks import CPU, fake_rank, fake_tensors, meta_buffers, move_to_meta
from esm2mega.plan.kernel import FusedAttention
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import wrap_data_parallel

Role = Literal["only", "first", "middle", "last"]
"""Says which stage of a pipeline one is: it embeds, predicts, does both, or neither."""

Device = Literal["cuda", "cpu"]

_PIPELINES: dict[Role, tuple[int, int]] = {"only": (1, 0), "first": (2, 0), "middle": (3, 1), "last": (2, 1)}
"""Gives the shortest pipeline that has such a stage, and the number of the stage in it."""

_MEASURED = (2, 3)
"""Numbers of layers that are measured; a stage of more layers costs as much more as the third one does."""


@dataclass(frozen=True)
class States:
    """Holds the bytes of what a rank keeps from step to step.

    Attributes:
        parameters: Weights that the model computes with, padding of the buffers included.
        gradients: Their gradients, likewise.
        optimizer: For each data- and context-parallel rank: master weights, both moments of Adam, and its
            step counts.
    """

    parameters: int
    gradients: int
    optimizer: tuple[int, ...]

    @property
    def most(self) -> int:
        """Return the bytes of the data-parallel rank that has most."""
        return self.parameters + self.gradients + max(self.optimizer)


def states_of(model: ModelConfig, parallel: ParallelConfig, world_size: int, stage: int) -> States:
    """Build a pipeline stage as its ranks would, and count its states on each data-parallel rank.

    All tensor-parallel ranks have as many.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    model = replace(model, compile=False, fp8=None)  # nothing is compiled for tensors without values
    with fake_rank(parallel, world_size, stage * (world_size // pp)):
        with fake_tensors(), _kernel("cuda", model):
            chunks = build_model(model, parallel, CPU, seed=0)
        for chunk in chunks:
            move_to_meta(chunk)
        with meta_buffers():
            wrapped = wrap_data_parallel(chunks, model, parallel)
        return _count_states(wrapped, model.precision, world_size // (tp * pp))


def _count_states(wrapped: Sequence[Any], precision: str, dp_size: int) -> States:
    """Count the states of wrapped chunks, real or fake.

    The distributed optimizer divides each bucket of a buffer evenly over the data-parallel ranks, so that
    weights are cut anywhere, and padding belongs to some of them.
    """
    buffers = [b for chunk in wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    numbers, pieces = [0] * dp_size, [0] * dp_size
    parameters = 0
    for buffer in buffers:
        is_divided = buffer.param_data is not None
        parameters += buffer.param_data.nbytes if is_divided else sum(p.nbytes for p in buffer.params)
        for start, end, number in buffer.param_index_map.values():
            bucket = buffer.buckets[number]
            share = bucket.grad_data.numel() // dp_size
            for rank in range(dp_size):
                low = max(start, bucket.offset + rank * share) if is_divided else start
                high = min(end, bucket.offset + (rank + 1) * share) if is_divided else end
                if high > low:
                    numbers[rank] += high - low
                    pieces[rank] += 1
    wide = 8 if precision == "fp64" else 4
    # Weights of half precision have a copy in fp32; Adam has two moments and, for each piece, a step count.
    each = wide * (3 if precision in ("bf16", "fp16") else 2)
    return States(
        parameters=parameters,
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=tuple(each * n + 4 * k for n, k in zip(numbers, pieces, strict=True)),
    )


def cost_of(
    model: ModelConfig,
    parallel: ParallelConfig,
    role: Role,
    layers: int,
    tokens: int,
    length: int,
    device: Device,
) -> Cost:
    """Return what one micro-batch costs a stage.

    Args:
        model: Shape and numerics.
        parallel: Layout; only what happens within the tensor- and context-parallel groups counts here.
        role: Which stage.
        layers: Layers of the stage, or of the chunk of an interleaved pipeline.
        tokens: T.
        length: Tokens of each protein.
        device: Where the job runs, which decides on the kernel of attention.
    """
    within = replace(
        ParallelConfig(parallel.tensor_model_parallel_size),
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        context_parallel_exchange=parallel.context_parallel_exchange,
    )
    settings = tuple(vars(model).items()), tuple(vars(within).items())
    rest = (tokens, length, device)
    if layers <= max(_MEASURED):
        return _measured(settings, role, layers, *rest)
    less, more = (_measured(settings, role, count, *rest) for count in _MEASURED)
    return less.extended(more, layers - _MEASURED[0])


@cache
def _measured(
    settings: tuple[Any, Any], role: Role, layers: int, tokens: int, length: int, device: Device
) -> Cost:
    """Run a stage of few layers forward and backward on fake tensors."""
    values, within = settings
    stages, number = _PIPELINES[role]
    model = replace(ModelConfig(**dict(values)), size=None, num_layers=stages * layers)
    model = replace(model, compile=False, fp8=None)
    parallel = replace(ParallelConfig(**dict(within)), pipeline_model_parallel_size=stages)
    of_stage = processes_of_a_replica(parallel) // stages
    equal = patch.object(esm2mega.model.build, "split_layers", lambda *a, **k: [layers] * stages)
    with (
        fake_rank(parallel, of_stage * stages, number * of_stage),
        fake_tensors(),
        _kernel(device, model) as kernel,
        equal,
    ):
        (chunk,) = build_model(model, parallel, CPU, seed=0)
        batch = example_batch(tokens, length)
        present = [
            *chunk.parameters(),
            *chunk.buffers(),
            batch.input_ids,
            batch.label_positions,
            batch.labels,
        ]
        for parameter in chunk.parameters():
            # Megatron-Core adds gradients of products to it, and drops those that autograd makes.
            parameter.main_grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        packed = PackedSequences.from_lengths(
            batch.seqlens, CPU, batch.label_counts, host_rows=batch.label_places
        )
        counter = StepCounter(present)
        hidden = None
        with counter:
            if number > 0:
                rows = tokens // shares_of_a_pack(parallel)
                hidden = torch.empty(
                    rows, 1, shape_of(model).hidden_size, dtype=DTYPES[model.precision], requires_grad=True
                )
                chunk.set_input_tensor([hidden])
            output: Any = chunk(batch.input_ids, packed, batch.head_inputs)
            if role in ("only", "last"):
                output = MLMLossReduction().forward(batch, output).loss_sum
            held = counter.live
            output.backward(torch.empty_like(output))
        hidden = output = None
        held -= counter.live  # buffers of Megatron-Core that all micro-batches share
        return Cost(
            counter.peak, held, counter.flops + kernel.flops, counter.moved, counter.sent, counter.exchanged
        )


def _drop_gradient(parameter: Any) -> None:
    parameter.grad = None


def example_batch(tokens: int, length: int) -> PackedBatch:
    """Return a pack of proteins of `length` tokens, of which as many are masked as in ESM-2."""
    seqlens = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
    counts = [round(LABELLED_SHARE * n) for n in seqlens]
    masked = sum(counts)
    residues = tokens - 2 * len(seqlens)
    starts = accumulate(seqlens, initial=0)
    places = [
        start + n * length // count
        for start, length, count in zip(starts, seqlens, counts, strict=False)
        for n in range(count)
    ]
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        cu_seqlens=torch.zeros(len(seqlens) + 1, dtype=torch.int32),
        seqlens=seqlens,
        max_seqlen=max(seqlens),
        label_positions=torch.tensor(places, dtype=torch.int64),
        host_positions=np.array(places, dtype=np.int64),
        labels=torch.zeros(masked, dtype=torch.int64),
        label_counts=counts,
        num_tokens=tokens,
        num_residues=residues,
        num_sequences=len(seqlens),
    )


@contextmanager
def _kernel(device: Device, model: ModelConfig) -> Iterator[FusedAttention]:
    """Let models take the kernel that `device` would give them, not that of this machine."""
    shape = shape_of(model)
    head_dim = shape.hidden_size // shape.num_attention_heads
    is_half = model.precision in ("bf16", "fp16")
    fused = device == "cuda" and is_half and head_dim % 8 == 0 and head_dim <= 256
    fused = fused and model.attention_backend != "sdpa" and not model.attention_dropout
    kernel = FusedAttention()
    name = "varlen" if fused else "sdpa"
    if device == "cpu" and model.attention_backend in ("auto", "native"):
        name = choose_kernel(model.attention_backend, torch.device("cpu"), DTYPES[model.precision], head_dim)
    with (
        patch.object(esm2mega.model.build, "choose_kernel", lambda *a: name),
        patch.dict(KERNELS, {"varlen": kernel}),
    ):
        yield kernel
