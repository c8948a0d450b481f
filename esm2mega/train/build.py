"""Makes the model and the optimizer of a training: chunks, weights, adapters, freezing, training state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esm2mega.checkpoint.tensor_filter import ALL, TRAINED, TensorFilter
from esm2mega.config.schema import Run
from esm2mega.convert.into_model import load_for_task, load_initial_weights
from esm2mega.convert.start_point import StartPoint
from esm2mega.lora.checkpoint import load_base
from esm2mega.lora.inject import adapters_line
from esm2mega.model.build import build_model
from esm2mega.model.freezing import check_stages
from esm2mega.model.heads.task import MakeHead, MakeModel
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.losses import LossReduction
from esm2mega.train.optimizer import train_state
from esm2mega.train.step import TrainState


@dataclass(frozen=True)
class HeadTraining:
    """Says how a model with the head of a task is built and which of its weights are trained.

    Attributes:
        make_head: Makes the head.
        freeze: Takes the chunks, freezes what is not trained, and returns a line on what is; not called if
            there are adapters.
        scales: Takes the chunks and returns factors of the learning rate by parameter.
        make_model: Makes a chunk; None for `ESM2ForTask`.
        transform: Freezes weights of a chunk and adds the adapters of the section ``lora``; None for the
            usual way.
    """

    make_head: MakeHead
    freeze: Callable[[Sequence[Any]], str]
    scales: Callable[[Sequence[Any]], Mapping[Tensor, float]]
    make_model: MakeModel | None = None
    transform: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Built:
    """Holds what is trained, with initial weights; the session loads those of a resumed checkpoint.

    Attributes:
        state: Model, optimizer, schedule, loss.
        saved: Which tensors checkpoints hold.
        auxiliary: Tensors that are saved but not trained.
        extra_state: Entries of ``train_state.json`` that say where to find tensors which checkpoints omit.
        banner: Lines that are printed at the start of the run.
    """

    state: TrainState
    saved: TensorFilter
    auxiliary: Mapping[str, Tensor]
    extra_state: Mapping[str, Any]
    banner: Sequence[str]


def build(
    run: Run,
    ranks: Ranks,
    start: StartPoint | None,
    loss: LossReduction,
    on_gradients: Callable[[list[Any]], None] | None = None,
    head: HeadTraining | None = None,
) -> Built:
    """Make this rank's share of a training; all ranks call this together.

    Args:
        run: The configuration.
        ranks: Where this process stands.
        start: Result of `esm2mega.train.start.open_training_start`.
        loss: The loss and its reduction.
        on_gradients: See `TrainState`.
        head: In fine-tuning, the head and what is trained; None in pretraining.

    Raises:
        UserError: The start does not fit the configuration, or nothing would be trained.
    """
    has_lora = run.lora.rank is not None
    own = (None, None) if head is None else (head.make_head, head.make_model)
    chunks = build_model(run.model, run.parallel, ranks.device, run.seed, own[0], has_lora, own[1])
    auxiliary: dict[str, Tensor] = {}
    extra_state: dict[str, Any] = {}
    banner = []
    if has_lora:
        assert start is not None
        # The auxiliary tensors of the base stay with it.
        base, _ = load_base(start, run, chunks, None if head is None else head.transform)
        extra_state = base.as_state()
        banner.append(adapters_line(run.lora, chunks))
    else:
        auxiliary = _load_whole(start, run, chunks)
        if head is not None:
            banner.append(head.freeze(chunks))
    if run.parallel.distributed_optimizer and (has_lora or head is not None):
        key = f"finetune.freeze={run.finetune.freeze}"
        check_stages(chunks, f"lora.target_modules={run.lora.target_modules}" if has_lora else key)
    state = train_state(run, chunks, loss, ranks, on_gradients, None if head is None else head.scales(chunks))
    if start is not None:
        start.release()
    return Built(state, TRAINED if has_lora else ALL, auxiliary, extra_state, banner)


def _load_whole(start: StartPoint | None, run: Run, chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Load the weights of a model without adapters, unless it is resumed; return its auxiliary tensors."""
    if start is None:
        return {}
    if start.is_resumed:
        return start.auxiliary()
    if run.task.kind is not None:
        return load_for_task(start, run, chunks)
    return load_initial_weights(start, run.model, chunks)
