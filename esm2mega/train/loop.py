"""The training loop: step, log, evaluate, save, stop. There is no other.

What decides the numbers is in `step.py`; this file decides when things happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from esm2mega.config.schema import Run, TrainConfig
from esm2mega.config.validate import num_micro_batches as num_micro_batches_of
from esm2mega.data.loader import TrainStream
from esm2mega.errors import StoppedBySignal
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.evaluate import perplexity
from esm2mega.train.signals import StopSignal
from esm2mega.train.step import StepResult, TrainState, train_step
from esm2mega.train.throughput import Lap, Throughput, memory_gb


@dataclass
class LoopState:
    """Where the loop stands; saved with every checkpoint, the same on every rank.

    Attributes:
        step: Finished optimizer steps.
        valid_loss: Of the evaluation at `step`; None when there was none.
        best_valid_loss: Lowest so far.
        evaluations_without_improvement: Since the lowest; what early stopping counts.
    """

    step: int = 0
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    evaluations_without_improvement: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Hooks:
    """What the loop does besides steps. Every rank calls all of them; the writers act on the rank that
    speaks.
    """

    log: Callable[[dict[str, Any]], None]
    show: Callable[[StepResult], None]
    evaluate: Callable[[], dict[str, float]] | None
    save: Callable[[LoopState], None]


def fit(
    run: Run, state: TrainState, stream: TrainStream, loop: LoopState, hooks: Hooks, ranks: Ranks
) -> None:
    """Train from `loop.step` to the end of the run; `loop` is advanced in place and saved at the end.

    Raises:
        StoppedBySignal: A signal came; the state has been saved.
    """
    train = run.train
    num_micro_batches = num_micro_batches_of(run, ranks.world_size)
    clock = Throughput(loop.step, stream.state.consumed_tokens, train.global_batch_tokens)
    with StopSignal(ranks.device) as stop:
        while loop.step < train.max_steps and not _out_of_patience(loop, train):
            result = train_step(state, list(islice(stream, num_micro_batches)))
            loop.step += 1
            loop.valid_loss = None
            hooks.show(result)
            stopping = stop.received()
            last = loop.step == train.max_steps or stopping
            if last or loop.step % train.log_every == 0:
                lap = clock.lap(loop.step, stream.state.consumed_tokens)
                hooks.log(
                    _training_record(
                        loop.step, result, lap, stream.state.consumed_tokens, memory_gb(ranks.device)
                    )
                )
            with clock.paused():
                improved = False
                if hooks.evaluate and not stopping and (last or _every(train.eval_every, loop.step)):
                    record = hooks.evaluate()
                    hooks.log({"kind": "eval", "step": loop.step, **record})
                    improved = note_evaluation(loop, record["valid_loss"], train)
                last = last or _out_of_patience(loop, train)
                best = improved and run.checkpoint.keep_best > 0
                if last or best or _every(run.checkpoint.save_every, loop.step):
                    hooks.save(loop)
            if stopping:
                raise StoppedBySignal(
                    f"stopped by {stop.name or 'another rank'} after step {loop.step}, which is saved; "
                    "start the same command again to go on"
                )


def note_evaluation(loop: LoopState, valid_loss: float, train: TrainConfig) -> bool:
    """Enter an evaluation into the state; True when it is the best so far by more than ``min_delta``."""
    best = loop.best_valid_loss
    improved = best is None or valid_loss < best - train.early_stopping.min_delta
    loop.valid_loss = valid_loss
    loop.best_valid_loss = valid_loss if best is None else min(best, valid_loss)
    loop.evaluations_without_improvement = 0 if improved else loop.evaluations_without_improvement + 1
    return improved


def _out_of_patience(loop: LoopState, train: TrainConfig) -> bool:
    patience = train.early_stopping.patience
    return patience > 0 and loop.evaluations_without_improvement >= patience


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _training_record(
    step: int, result: StepResult, lap: Lap, consumed_tokens: int, memory: float
) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": result.metrics["loss"],
        "perplexity": perplexity(result.metrics["loss"]),
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "consumed_tokens": consumed_tokens,
        "tokens_per_second": lap.tokens_per_second,
        "step_time": lap.step_time,
        "pack_fill": lap.pack_fill,
        "memory_gb": memory,
    }
