"""Runs the only training loop: step, log, evaluate, save, stop.

What decides the numbers is in `step.py`; this file decides when things happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from esm2mega.config.schema import Run, TrainConfig
from esm2mega.config.validate import num_micro_batches as num_micro_batches_of
from esm2mega.data.stream.loader import PackStream
from esm2mega.errors import StoppedBySignal
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.losses import loss_and_perplexity
from esm2mega.train.signals import StopSignal
from esm2mega.train.step import StepResult, TrainState, train_step
from esm2mega.train.throughput import Throughput, memory_gb, sum_over_data_parallel


@dataclass
class LoopState:
    """Holds the progress of the loop, which is saved with every checkpoint and is the same on every rank.

    Attributes:
        step: Finished optimizer steps.
        valid_loss: Validation loss at `step`; None if it was not evaluated there.
        best_valid_loss: Lowest validation loss so far; None before the first evaluation.
        best_step: Step of the lowest validation loss.
        evaluations_without_improvement: Evaluations since the last improvement, for early stopping.
        test_loss: Loss on the test split, computed at the end of the run; None before.
    """

    step: int = 0
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    test_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Evaluation = Callable[[Callable[[], bool]], dict[str, Any] | None]
"""Returns the values of a record; or None once its argument, which it calls now and then, returns True."""


@dataclass(frozen=True)
class Hooks:
    """Holds what the loop calls besides steps, on every rank; those that write act on the main rank only."""

    log: Callable[[dict[str, Any]], None]
    show: Callable[[StepResult], None]
    evaluate: Evaluation | None
    test: Evaluation | None
    save: Callable[[LoopState], None]
    training_values: Callable[[dict[str, float]], dict[str, float]] = loss_and_perplexity


def fit(
    run: Run, state: TrainState, stream: PackStream[Any], loop: LoopState, hooks: Hooks, ranks: Ranks
) -> None:
    """Train from `loop.step` to the end of the run; `loop` is updated in place and saved at the end.

    Raises:
        StoppedBySignal: A signal came; the state has been saved.
    """
    train = run.train
    num_micro_batches = num_micro_batches_of(run.train, run.parallel, ranks.world_size)
    clock = Throughput(loop.step, stream.state.consumed_tokens, train.global_batch_tokens)
    residues = 0
    with StopSignal(ranks.device) as stop:
        # A run that was stopped by a signal in its last step has not been evaluated there.
        if hooks.evaluate and loop.step and finished(loop, train) and loop.valid_loss is None:
            _evaluate(loop, hooks, train, stop)
            _raise_if(stop, loop)
            hooks.save(loop)
        while not finished(loop, train):
            batches = list(islice(stream, num_micro_batches))
            result = train_step(state, batches)
            loop.step += 1
            loop.valid_loss = loop.test_loss = None
            residues += sum(batch.num_residues for batch in batches)
            hooks.show(result)
            stopping = stop.received()
            last = loop.step == train.max_steps or stopping
            if last or loop.step % train.log_every == 0:
                tokens = stream.state.consumed_tokens
                lap = clock.lap(loop.step, tokens, sum_over_data_parallel(residues, ranks.device))
                values = hooks.training_values(result.metrics)
                hooks.log(
                    {
                        "kind": "train",
                        "step": loop.step,
                        **values,
                        "lr": result.lr,
                        "grad_norm": result.grad_norm,
                        "consumed_tokens": tokens,
                        "tokens_per_second": lap.tokens_per_second,
                        "step_time": lap.step_time,
                        "pack_fill": lap.pack_fill,
                        "memory_gb": memory_gb(ranks.device),
                    }
                )
                residues = 0
            with clock.paused():
                improved = False
                if not stopping and (last or _every(train.eval_every, loop.step)):
                    improved = _evaluate(loop, hooks, train, stop)
                last = last or finished(loop, train) or stop.stopping
                best = improved and run.checkpoint.keep_best > 0
                if last or best or _every(run.checkpoint.save_every, loop.step):
                    hooks.save(loop)
            _raise_if(stop, loop)
        if hooks.test and loop.step and loop.test_loss is None:
            record = hooks.test(stop.received)
            _raise_if(stop, loop)
            assert record is not None
            hooks.log({"kind": "test", "step": loop.step, **record})
            loop.test_loss = record["test_loss"]
            hooks.save(loop)


def finished(loop: LoopState, train: TrainConfig) -> bool:
    """Return whether no step is left to do."""
    return loop.step >= train.max_steps or out_of_patience(loop, train)


def out_of_patience(loop: LoopState, train: TrainConfig) -> bool:
    """Return whether early stopping ends the run."""
    patience = train.early_stopping.patience
    return patience > 0 and loop.evaluations_without_improvement >= patience


def note_evaluation(loop: LoopState, valid_loss: float, train: TrainConfig) -> bool:
    """Enter an evaluation into the state; return whether it is the best so far by more than ``min_delta``."""
    best = loop.best_valid_loss
    improved = best is None or valid_loss < best - train.early_stopping.min_delta
    loop.valid_loss = valid_loss
    if best is None or valid_loss < best:
        loop.best_valid_loss, loop.best_step = valid_loss, loop.step
    loop.evaluations_without_improvement = 0 if improved else loop.evaluations_without_improvement + 1
    return improved


def _evaluate(loop: LoopState, hooks: Hooks, train: TrainConfig, stop: StopSignal) -> bool:
    """Validate, log and enter the result; return whether it is the best so far by more than ``min_delta``."""
    record = hooks.evaluate(stop.received) if hooks.evaluate else None
    if record is None:
        return False
    hooks.log({"kind": "eval", "step": loop.step, **record})
    return note_evaluation(loop, record["valid_loss"], train)


def _raise_if(stop: StopSignal, loop: LoopState) -> None:
    if stop.stopping:
        raise StoppedBySignal(
            f"stopped by {stop.name or 'another rank'} after step {loop.step}, which is saved; "
            "start the same command again to go on"
        )


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
