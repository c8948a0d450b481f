"""Puts the stages of one layout together: memory of every rank, communication, bubble and time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from esm2mega.config.batches import data_parallel_size, num_micro_batches, shares_of_a_pack
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ModelConfig, ParallelConfig, Run
from esm2mega.model.build import DTYPES
from esm2mega.model.esm2 import padded_vocab_size
from esm2mega.model.pipeline_split import last_layer_is_whole, split_layers
from esm2mega.plan.counting import Cost
from esm2mega.plan.hardware import Hardware
from esm2mega.plan.stage import Device, Role, States, cost_of, example_batch, states_of


@dataclass(frozen=True)
class StagePlan:
    """Holds what a rank of one pipeline stage needs; bytes.

    Attributes:
        layers: Layers of the stage.
        states: Parameters, gradients and optimizer of its ranks.
        activations: Most bytes of activations at once, those of all micro-batches in flight.
        in_flight: Micro-batches that wait for their backward pass at that moment.
        batches: Tokens and labels of the micro-batches of a step.
    """

    layers: int
    states: States
    activations: int
    in_flight: int
    batches: int

    @property
    def total(self) -> int:
        """Return the bytes of the rank that has most."""
        return self.states.most + self.activations + self.batches


@dataclass(frozen=True)
class LayoutPlan:
    """Holds what one layout needs and how long its steps take.

    Attributes:
        model: Shape and numerics, with the recomputation that the layout has.
        parallel: The layout.
        data_parallel_size: Replicas of the model.
        micro_batches: Micro-batches of a step on each rank.
        stages: The stages of the pipeline.
        sent: Bytes that a rank sends in a step to its ``tensor``, ``context``, ``pipeline`` and ``data``
            groups.
        bubble: Share of a step in which a stage waits for others.
        step_seconds: Estimated duration of a step; None without rates.
        tokens_per_second: Of the whole job; None without rates.
    """

    model: ModelConfig
    parallel: ParallelConfig
    data_parallel_size: int
    micro_batches: int
    stages: Sequence[StagePlan]
    sent: dict[str, float]
    bubble: float
    step_seconds: float | None
    tokens_per_second: float | None

    @property
    def worst(self) -> StagePlan:
        """Return the stage whose ranks need most memory."""
        return max(self.stages, key=lambda stage: stage.total)


def estimate(run: Run, world_size: int, device: Device, hardware: Hardware | None, length: int) -> LayoutPlan:
    """Plan a valid configuration.

    Args:
        run: The configuration.
        world_size: Processes of the job.
        device: Where they run.
        hardware: Rates for the time of a step; None for none.
        length: Tokens of each protein.
    """
    model, parallel, tokens = run.model, run.parallel, run.train.micro_batch_tokens
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    dp = data_parallel_size(parallel, world_size)
    count = num_micro_batches(run.train, parallel, world_size)
    hidden = tokens * shape_of(model).hidden_size * DTYPES[model.precision].itemsize
    hidden //= shares_of_a_pack(parallel)
    batch = example_batch(tokens, length)
    batches = count * sum(
        x.nbytes for x in (batch.input_ids, batch.cu_seqlens, batch.label_positions, batch.labels)
    )

    stages, seconds, sent, exchanged = [], [], 0.0, 0.0
    for number, layers in enumerate(stage_layers(model, parallel)):
        chunks = [
            cost_of(model, parallel, role, layers // virtual, tokens, length, device)
            for role in _roles(number, pp, virtual)
        ]
        waiting = in_flight(number, pp, virtual, count)
        activations = _activations(chunks, waiting)
        if number > 0 and count * virtual > waiting:
            activations += hidden  # the gradient of the last input, which is kept until the next one
        states = _states(
            _shape_key(model), _layout_key(parallel), world_size, _twin(number, pp, layers, model, parallel)
        )
        stages.append(StagePlan(layers, states, round(activations), waiting, batches))
        sent = max(sent, sum(chunk.sent for chunk in chunks))
        exchanged = max(exchanged, sum(chunk.exchanged for chunk in chunks))
        if hardware is not None:
            seconds.append(_seconds(chunks, model, hardware, tp, tp * parallel.context_parallel_size))
    volume = {
        "tensor": sent * count,
        **({"context": exchanged * count} if parallel.context_parallel_size > 1 else {}),
        "pipeline": 2.0 * hidden * virtual * count if pp > 1 else 0.0,
        "data": max(_gradient_traffic(stage.states, parallel, world_size // (tp * pp)) for stage in stages),
    }
    bubble = (pp - 1) / (count * virtual + pp - 1)
    step = None
    if hardware is not None:
        across = hardware.link if world_size <= hardware.per_host else hardware.network
        step = max(seconds) * count / (1 - bubble)
        step += (volume["pipeline"] + volume["data"]) / across
        step += 2 * max(stage.states.most for stage in stages) / hardware.memory
    return LayoutPlan(
        model, parallel, dp, count, stages, volume, bubble, step,
        None if step is None else count * dp * tokens / step,
    )  # fmt: skip


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Return how many layers each stage has, over all its chunks."""
    shape, stages = shape_of(model), parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None:
        return [shape.num_layers // stages] * stages
    whole = last_layer_is_whole(model, parallel)
    vocabulary = padded_vocab_size(parallel.tensor_model_parallel_size)
    return split_layers(shape, stages, vocabulary, last_layer_whole=whole)


def in_flight(stage: int, stages: int, virtual: int, micro_batches: int) -> int:
    """Return the most micro-batches, or chunks of them, that wait for their backward pass at once.

    Those are the schedules of Megatron-Core: a stage runs as many forward passes as there are stages behind
    it, twice as many if they are interleaved and those of its other chunks too, and then one of each in turn.
    """
    if virtual == 1:
        return min(micro_batches, stages - stage)
    return min(micro_batches * virtual, 2 * (stages - stage - 1) + (virtual - 1) * stages + 1)


def _roles(stage: int, stages: int, virtual: int) -> list[Role]:
    """Return the roles of the chunks of a stage; there is one unless the pipeline is interleaved."""
    if stages == 1:
        return ["only"]
    roles: list[Role] = ["middle"] * virtual
    if stage == 0:
        roles[0] = "first"
    if stage == stages - 1:
        roles[-1] = "last"
    return roles


def _activations(chunks: Sequence[Cost], waiting: int) -> float:
    """Return the bytes of activations when most micro-batches wait and one more is computed."""
    held = sum(chunk.held for chunk in chunks) / len(chunks)
    return (waiting - 1) * held + max(chunk.peak for chunk in chunks)


def _gradient_traffic(states: States, parallel: ParallelConfig, copies: int) -> float:
    """Return the bytes that a rank sends in a step so that all `copies` of the weights stay the same."""
    share = (copies - 1) / copies
    if parallel.distributed_optimizer:
        return share * (states.gradients + states.parameters)
    return 2 * share * states.gradients


def _seconds(
    chunks: Sequence[Cost], model: ModelConfig, hardware: Hardware, tensor: int, context: int
) -> float:
    """Return how long a stage takes for a micro-batch, if nothing overlaps.

    Args:
        chunks: What its chunks cost.
        model: Shape and numerics.
        hardware: Rates.
        tensor: Neighbouring processes over which a tensor-parallel group extends.
        context: The same of a context-parallel group.
    """

    def rate(extent: int) -> float:
        return hardware.link if extent <= hardware.per_host else hardware.network

    return sum(
        chunk.flops / hardware.products(model.precision)
        + chunk.moved / hardware.memory
        + chunk.sent / rate(tensor)
        + chunk.exchanged / rate(context)
        for chunk in chunks
    )


def _twin(number: int, stages: int, layers: int, model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the first stage with states as those of stage `number`: all stages in the middle are alike."""
    if number in (0, stages - 1):
        return number
    return next(n for n, other in enumerate(stage_layers(model, parallel)) if n and other == layers)


def _shape_key(model: ModelConfig) -> tuple[object, ...]:
    return tuple(vars(replace(model, recompute="none")).values())


def _layout_key(parallel: ParallelConfig) -> tuple[object, ...]:
    return tuple(vars(parallel).values())


@cache
def _states(model: tuple[object, ...], parallel: tuple[object, ...], world_size: int, stage: int) -> States:
    return states_of(ModelConfig(*model), ParallelConfig(*parallel), world_size, stage)  # type: ignore[arg-type]
