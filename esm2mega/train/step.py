"""Runs one optimizer step: forward and backward under Megatron-Core's schedule, clipping, update.

Legend: ``T`` tokens of a micro-batch (its pack length).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.batch import LabelledBatch, PackedBatch
from esm2mega.data.counter_rng import Purpose, bits_at, stream_starts
from esm2mega.model.esm2 import shares_of_tokens
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel import kernels
from esm2mega.parallel.host_copy import HostCopy
from esm2mega.parcel import Parcel
from esm2mega.train.losses import LossReduction, Means

MIN_LOSS_SCALE = 1.0
"""The loss scale of fp16 is never lower: a gradient that overflows at it is not finite in earnest."""

Batch = PackedBatch | LabelledBatch
"""Is a pack for masked language modelling, or one with labels for the head of a task."""


@dataclass
class TrainState:
    """Holds everything that a step reads or changes, except the data.

    Attributes:
        on_gradients: Called in every step with `model` when its gradients are complete (summed over all
            ranks, divided by the count, without the loss scale) and not yet clipped; for proofs and
            diagnosis. With the distributed optimizer that is so in the share of this rank.
        dropout_seed: Seed of the dropout in the encoder and its adapters; None if there is none.
    """

    model: list[Any]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    loss: LossReduction
    device: torch.device
    on_gradients: Callable[[list[Any]], None] | None = None
    dropout_seed: int | None = None


@dataclass(frozen=True)
class StepResult:
    """Holds what a step did; all but `suspects` is the same on every rank.

    Attributes:
        metrics: Global means by name (``loss`` first) and ``count``, the number of labels. In a step without
            labels the loss is None.
        grad_norm: L2 norm of the whole model's gradient before clipping.
        lr: Learning rate of the step.
        loss_scale: Factor of the loss in this step, in fp16; None in other precisions.
        suspects: Numbers, within the step, of this rank's micro-batches whose loss is not finite; only ranks
            of the last pipeline stage know them.
    """

    metrics: Means
    grad_norm: float
    lr: float
    loss_scale: float | None = None
    suspects: tuple[int, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Return whether the weights were updated: loss and gradient were finite."""
        return math.isfinite(self.grad_norm) and self._has_finite_loss

    @property
    def overflowed(self) -> bool:
        """Return whether a gradient was too large for fp16 at a loss scale that can still be lowered."""
        can_be_lowered = self.loss_scale is not None and self.loss_scale > MIN_LOSS_SCALE
        return can_be_lowered and self._has_finite_loss and not math.isfinite(self.grad_norm)

    @property
    def _has_finite_loss(self) -> bool:
        loss = self.metrics["loss"]
        return loss is None or math.isfinite(loss)


def dropout_keys(seed: int, batch: Batch) -> Tensor:
    """Return 64 random bits for each segment of a pack, for the dropout of the encoder: int64 ``[n]``.

    They follow from the seed and from which sample, and which piece of it, the segment is. Padding has 0.

    Args:
        seed: Seed of the run.
        batch: The pack.
    """
    keys = np.zeros(len(batch.seqlens), dtype=np.int64)
    if batch.samples:
        numbers, first_tokens = np.array(batch.samples, dtype=np.int64).T
        borders = np.cumsum([0, *batch.seqlens[:-1]])
        streams = stream_starts(seed, Purpose.ENCODER_DROPOUT, numbers)
        keys[np.searchsorted(borders, batch.starts)] = bits_at(streams, first_tokens).astype(np.int64)
    return torch.from_numpy(keys)


def forward_step(
    loss: LossReduction, batches: Iterator[Batch], model: Any, dropout_seed: int | None = None
) -> tuple[Tensor, Any]:
    """Run the model on a micro-batch; return its output and the function that makes a loss of it."""
    batch = next(batches)
    device = batch.input_ids.device
    places = batch.label_places
    packed = PackedSequences.from_lengths(batch.seqlens, device, batch.label_counts, batch.borders, places)
    if dropout_seed is not None:
        (keys,) = Parcel.of([dropout_keys(dropout_seed, batch)]).to(device)
        packed = packed.with_dropout_keys(keys)
    return model(batch.input_ids, packed, batch.head_inputs), loss.bind(batch)


def run_schedule(
    model: list[Any],
    loss: LossReduction,
    batches: Sequence[Batch],
    device: torch.device,
    forward_only: bool,
    dropout_seed: int | None = None,
) -> list[dict[str, Tensor]]:
    """Run this rank's micro-batches through the pipeline.

    Args:
        model: This rank's chunks.
        loss: The loss and its reduction.
        batches: This rank's micro-batches, in a pipeline all of the same T; every chunk reads them all.
            Without a pipeline each is asked for when its turn comes.
        device: Where the micro-batches are wanted.
        forward_only: Whether to leave the gradients out, as in evaluation.
        dropout_seed: As in `TrainState`.

    Returns:
        The reports of `loss`, one per micro-batch; empty on all but the last pipeline stage.
    """
    seq_length = batches[0].input_ids.numel() + _set_carried_rows(model, batches)
    iterators = itertools.tee((batch.to(device) for batch in batches), len(model))
    return get_forward_backward_func()(
        forward_step_func=lambda data, chunk: forward_step(loss, data, chunk, dropout_seed),
        data_iterator=list(iterators) if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _set_carried_rows(model: list[Any], batches: Sequence[Batch]) -> int:
    """Tell the chunks the most rows that any micro-batch sends to the next stage; return them in tokens.

    The schedule gives all micro-batches the same shape, and under sequence and context parallelism an equal
    share of the tokens to each rank.
    """
    chunks = unwrap_model(model)
    if chunks[0].config.pipeline_model_parallel_size == 1:
        return 0
    rows = max(chunks[0].rows_to_carry(batch.head_inputs) for batch in batches)
    for chunk in chunks:
        chunk.carried_rows = rows
    config = chunks[0].config
    return rows * shares_of_tokens(config)


@dataclass(frozen=True)
class LaunchedStep:
    """Is a step whose work was given to the device, which may not have done it yet.

    Attributes:
        numbers: Sums and counts of the loss, and the squared gradient norm, on their way to the host.
        reports: The reports of the loss, one per micro-batch.
        loss: Makes means of the sums and counts.
        lr: As in `StepResult`.
        loss_scale: As in `StepResult`.
    """

    numbers: HostCopy
    reports: list[dict[str, Tensor]]
    loss: LossReduction
    lr: float
    loss_scale: float | None

    def result(self) -> StepResult:
        """Return what the step did, once it is done; a GPU is waited for."""
        *totals, squares = self.numbers.values()
        metrics = self.loss.means_of([totals[at : at + 2] for at in range(0, len(totals), 2)])
        suspects: tuple[int, ...] = ()
        norm = squares**0.5
        if not StepResult(metrics, norm, self.lr).is_finite:
            losses = [float(report["loss"][0]) for report in self.reports]
            suspects = tuple(number for number, loss in enumerate(losses) if not math.isfinite(loss))
        return StepResult(metrics, norm, self.lr, self.loss_scale, suspects)


def train_step(state: TrainState, batches: Sequence[Batch]) -> StepResult:
    """Update the weights once, as `launch_step` does, and wait for the result."""
    return launch_step(state, batches).result()


def launch_step(state: TrainState, batches: Sequence[Batch]) -> LaunchedStep:
    """Update the weights once, unless the loss or the gradient is not finite.

    Without an update, weights and optimizer stay as they are, bit for bit; the step counts for the schedule.
    The decision is made on the device, so that the host need not wait for loss and norm; only fp16 waits, for
    its loss scale.

    Args:
        state: Model, optimizer, schedule, loss.
        batches: This rank's micro-batches of the step.
    """
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    reports = run_schedule(
        state.model,
        state.loss,
        batches,
        state.device,
        forward_only=False,
        dropout_seed=state.dropout_seed,
    )
    totals = state.loss.totals(reports, state.device)
    # The rate of a group without a factor; the rates of all groups were set at the end of the last step.
    lr = float(state.schedule.get_lr({}))
    loss_scale = _loss_scale(state.optimizer)
    # The parts of `MegatronOptimizer.step`, with a norm that stays on the device. The first divides the
    # gradients by the loss scale, and sets that of the next step.
    state.optimizer.prepare_grads()
    if state.on_gradients is not None:
        state.on_gradients(state.model)
    squares = kernels.squared_norm(state.optimizer)
    numbers = torch.cat([totals.flatten(), squares.double()])
    # Counts are finite, and so is the sum over no labels.
    is_bad = (~torch.isfinite(numbers)).any().float()
    kernels.clip(state.optimizer, squares)
    kernels.update_unless(state.optimizer, is_bad)
    state.schedule.step(increment=1)
    return LaunchedStep(HostCopy(numbers), reports, state.loss, lr, loss_scale)


def _loss_scale(optimizer: MegatronOptimizer) -> float | None:
    """Return the factor of the loss, the same on every rank; None if there is none."""
    # All parts have the same; a rank whose weights are all frozen has one too.
    (part, *_) = getattr(optimizer, "chained_optimizers", [optimizer])
    scaler = getattr(part, "grad_scaler", None)
    return None if scaler is None else float(scaler.scale)
