"""Runs the only training loop: step, log, evaluate, save, stop.

What decides the numbers is in `step.py`; this file decides when things happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from esm2mega.checkpoint.saver import Saver
from esm2mega.config.batches import num_micro_batches as num_micro_batches_of
from esm2mega.config.best_metric import VALID_LOSS, less_is_better
from esm2mega.config.schema import CheckpointConfig, Run, TrainConfig
from esm2mega.data.stream.loader import PackStream
from esm2mega.errors import LostWorkerError, MachineError, StoppedBySignal
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.log import EARLY_STOP
from esm2mega.train.downstream import DownstreamHook
from esm2mega.train.incidents import Incidents, RollBack
from esm2mega.train.losses import Means, loss_and_perplexity
from esm2mega.train.samples import samples_of_step
from esm2mega.train.signals import StopSignal
from esm2mega.train.step import Batch, StepResult, TrainState, train_step
from esm2mega.train.throughput import Throughput, memory_gb, sums_over_data_parallel


@dataclass
class LoopState:
    """Holds the progress of the loop, which is saved with every checkpoint and is the same on every rank.

    Attributes:
        step: Finished optimizer steps.
        evaluation: What was measured at `step`, by the names of the log; a metric that is not defined is
            None. None if nothing was evaluated there.
        best_value: Best value of `checkpoint.best_metric` so far; None before the first.
        best_step: Step of the best value.
        ranking: Step -> value of the `checkpoint.keep_best` best evaluations, best first. The checkpoint of
            each of them is in the directory of the run.
        evaluations_without_improvement: Evaluations since the last improvement, for early stopping.
        early_stop_step: Step at which early stopping has ended the run, as its log says; None if it has not.
        eval_recipe: Hash of the recipe of these evaluations; None in files of earlier versions.
        eval_proteins: Hash of the proteins that they are made with; None before the first.
        test_loss: Loss on the test split, computed at the end of the run; None before.
        downstream_step: Step of the last measurement of downstream tasks; None before the first.
    """

    step: int = 0
    evaluation: dict[str, Any] | None = None
    best_value: float | None = None
    best_step: int | None = None
    ranking: dict[int, float] = field(default_factory=dict)
    evaluations_without_improvement: int = 0
    early_stop_step: int | None = None
    eval_recipe: str | None = None
    eval_proteins: str | None = None
    test_loss: float | None = None
    downstream_step: int | None = None

    @property
    def valid_loss(self) -> float | None:
        """Return the validation loss at `step`; None if nothing was evaluated or to be predicted there."""
        return None if self.evaluation is None else self.evaluation[VALID_LOSS]

    def restart_best(self) -> None:
        """Forget which evaluations were the best, since those to come cannot be compared with them."""
        self.best_value, self.best_step, self.ranking = None, None, {}
        self.evaluations_without_improvement = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LoopState:
        """Read what `to_dict` returned, also after JSON, or version 0.1.0, which compared losses alone."""
        values = dict(saved)
        if "best_valid_loss" in values:
            loss, best = values.pop(VALID_LOSS), values.pop("best_valid_loss")
            values |= {"evaluation": None if loss is None else {VALID_LOSS: loss}, "best_value": best}
            values["ranking"] = {} if best is None else {values["best_step"]: best}
        values["ranking"] = {int(step): value for step, value in values["ranking"].items()}
        return cls(**values)


Evaluation = Callable[[Callable[[], bool]], dict[str, Any] | None]
"""Returns the values of a record; or None once its argument, which it calls now and then, returns True."""


@dataclass(frozen=True)
class Hooks:
    """Holds what the loop calls besides steps, on every rank; those that write act on the main rank only.

    `save` begins to save by `saver`, which finishes it.
    `verified` waits a moment for the verification of the training data and returns, the same on every rank,
    whether it has ended well; it raises on every rank if the data are damaged. `alarm` tells whether this
    rank knows that already.
    """

    log: Callable[[dict[str, Any]], None]
    show: Callable[[StepResult], None]
    say: Callable[[str], None]
    evaluate: Evaluation | None
    test: Evaluation | None
    is_sound: Callable[[Sequence[Batch]], bool]
    save: Callable[[LoopState], None]
    saver: Saver
    training_values: Callable[[Means], Means] = loss_and_perplexity
    verified: Callable[[], bool] = lambda: True
    alarm: Callable[[], bool] = lambda: False
    downstream: DownstreamHook | None = None


def fit(
    run: Run,
    state: TrainState,
    stream: PackStream[Any],
    loop: LoopState,
    hooks: Hooks,
    ranks: Ranks,
    stop: StopSignal,
    incidents: Incidents,
) -> None:
    """Train from `loop.step` to the end of the run; `loop` is updated in place and saved at the end.

    Args:
        run: The configuration.
        state: What a step needs.
        stream: The training batches.
        loop: Progress so far.
        hooks: What is done besides steps.
        ranks: Where this process stands.
        stop: Tells of signals while this runs, and of the end of the time.
        incidents: What was not finite so far.

    Raises:
        StoppedBySignal: A signal came or the time is up; the state has been saved.
        MachineError: Loss, gradient or weights are not finite, and the run ends for that.
        RollBack: They are not finite, and the run must go on from its last good checkpoint.
        DamagedError: The training data are damaged; no state was saved since that was found.
    """
    train = run.train
    num_micro_batches = num_micro_batches_of(run.train, run.parallel, ranks.world_size)
    clock = Throughput(loop.step)
    counts = (0, 0, 0)
    # Micro-batches that had a finite loss.
    probe: Sequence[Batch] = ()
    # Whether weights are being saved that are finite, and of which the next step tells whether their loss is.
    is_unproven = False
    stop.alarm, stop.is_saving = hooks.alarm, lambda: hooks.saver.is_writing
    with stop:
        # A run that was stopped by a signal in its last step has not been evaluated there.
        if hooks.evaluate and loop.step and finished(loop, train) and loop.evaluation is None:
            _evaluate(loop, hooks, run, stop, incidents)
            _raise_if(stop, loop, hooks)
            _save(loop, hooks, stop)
        # A run that goes on with less patience than before may have none left.
        if _note_early_stop(loop, train, hooks.log):
            _save(loop, hooks, stop)
        while not finished(loop, train):
            before = stream.state
            batches = stream.next_step(num_micro_batches)
            with _saved_first(hooks):
                result = train_step(state, batches)
            loop.step += 1
            loop.evaluation = loop.test_loss = None
            counts = _counted(counts, batches)
            hooks.show(result)
            if hooks.downstream is not None:
                hooks.downstream.poll()
            stopping = stop.received()
            if result.is_finite:
                incidents.note_finite(loop.step)
                probe, is_unproven = batches[:1], False
            elif result.overflowed:
                # Megatron-Core's own way to find the loss scale: the loss is finite, and so are the weights.
                probe, is_unproven = batches[:1], False
                hooks.say(
                    f"step {loop.step}: a gradient overflowed in fp16 at loss scale {result.loss_scale:g}, "
                    "so the step is skipped"
                )
            else:
                # A step that is not finite has left the weights as they are.
                if is_unproven and not hooks.is_sound(probe):
                    hooks.saver.discard()
                    incidents.note_weights(loop.step - 1)
                is_unproven = False
                with _saved_first(hooks):
                    hooks.say(incidents.note_step(loop.step, result, batches, stream, before, ranks))
            last = loop.step == train.max_steps or stopping
            if last or loop.step % train.log_every == 0:
                lap = clock.lap(loop.step, *sums_over_data_parallel(counts, ranks.device))
                values = hooks.training_values(result.metrics)
                hooks.log(
                    {
                        "kind": "train",
                        "step": loop.step,
                        **values,
                        "lr": result.lr,
                        "grad_norm": result.grad_norm,
                        **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
                        "consumed_tokens": stream.state.consumed_tokens,
                        "tokens_per_second": lap.tokens_per_second,
                        "step_time": lap.step_time,
                        "pack_fill": lap.pack_fill,
                        "memory_gb": memory_gb(ranks.device),
                        **({"samples": samples_of_step(batches)} if run.logging.samples else {}),
                    }
                )
                counts = (0, 0, 0)
            with clock.paused():
                if not stop.saving:
                    _finish_save(hooks, stop)
                is_kept = False
                if not stopping and (last or _every(train.eval_every, loop.step)):
                    is_kept = _evaluate(loop, hooks, run, stop, incidents)
                last = last or finished(loop, train) or stop.stopping
                if last or is_kept or _every(run.checkpoint.save_every, loop.step):
                    # A finite loss of the evaluation says that that of a training pack is finite too.
                    is_unproven = loop.valid_loss is None and run.checkpoint.async_save and not last
                    is_proven = loop.valid_loss is not None or is_unproven
                    if not hooks.is_sound(() if is_proven else probe):
                        with _saved_first(hooks):
                            incidents.note_weights(loop.step)
                    _save(loop, hooks, stop)
                if last:
                    _finish_save(hooks, stop)
                    if hooks.downstream is not None:
                        hooks.downstream.finish(stop.received)
            _raise_if(stop, loop, hooks)
        _finish_save(hooks, stop)
        if hooks.downstream is not None:
            hooks.downstream.finish(stop.received)
            _raise_if(stop, loop, hooks)
        if hooks.test and loop.step and loop.test_loss is None:
            record = hooks.test(stop.received)
            _raise_if(stop, loop, hooks)
            assert record is not None
            if words := incidents.note_evaluation(loop.step, "test", record["test_loss"]):
                hooks.say(words)
            # The record of other weights than the last names their step.
            hooks.log({"kind": "test", "step": loop.step, **record})
            loop.test_loss = record["test_loss"]
            _save(loop, hooks, stop)
            _finish_save(hooks, stop)
        # A run in which nothing was left to do has not waited yet.
        while not hooks.verified() and not stop.received():
            pass
        _raise_if(stop, loop, hooks)


def _counted(counts: tuple[int, int, int], batches: Sequence[Batch]) -> tuple[int, int, int]:
    """Add to numbers of tokens, of tokens with padding, and of residues those of this rank's batches."""
    tokens, computed, residues = counts
    return (
        tokens + sum(batch.num_tokens for batch in batches),
        computed + sum(len(batch.input_ids) for batch in batches),
        residues + sum(batch.num_residues for batch in batches),
    )


def finished(loop: LoopState, train: TrainConfig) -> bool:
    """Return whether no step is left to do."""
    return loop.step >= train.max_steps or out_of_patience(loop, train)


def out_of_patience(loop: LoopState, train: TrainConfig) -> bool:
    """Return whether early stopping ends the run."""
    patience = train.early_stopping.patience
    return patience > 0 and loop.evaluations_without_improvement >= patience


def begin_evaluations(loop: LoopState, recipe: str, proteins: str | None) -> bool:
    """Enter how the evaluations to come are made, and forget the results of those made otherwise.

    Results of different recipes or proteins cannot be compared: the best and the patience of early stopping
    start anew.

    Args:
        loop: The state, which is changed.
        recipe: Hash of the recipe.
        proteins: Hash of the validation proteins; None without any.

    Returns:
        Whether there was a best one to forget.
    """
    if loop.eval_recipe == recipe and proteins in (None, loop.eval_proteins):
        return False
    forgotten = loop.best_value is not None
    loop.eval_recipe, loop.evaluation, loop.test_loss = recipe, None, None
    loop.eval_proteins = proteins
    loop.restart_best()
    return forgotten


def note_evaluation(
    loop: LoopState, record: Mapping[str, Any], train: TrainConfig, checkpoint: CheckpointConfig
) -> bool:
    """Enter an evaluation into the state.

    A metric that is not defined, such as the correlation of constant predictions, is no improvement and never
    among the best. None, where there was nothing to predict, is compared with nothing.

    Returns:
        Whether it is among the `checkpoint.keep_best` best so far.
    """
    loop.evaluation = {name: defined(value) for name, value in record.items()}
    # What is measured at some evaluations only is not there at the others.
    value, best = loop.evaluation.get(checkpoint.best_metric), loop.best_value
    if value is None:
        loop.evaluations_without_improvement += record.get(checkpoint.best_metric) is not None
        return False
    sign = 1 if less_is_better(checkpoint.best_metric) else -1
    improved = best is None or sign * value < sign * best - train.early_stopping.min_delta
    if best is None or sign * value < sign * best:
        loop.best_value, loop.best_step = value, loop.step
    loop.evaluations_without_improvement = 0 if improved else loop.evaluations_without_improvement + 1
    ranked = sorted({**loop.ranking, loop.step: value}.items(), key=lambda entry: (sign * entry[1], entry[0]))
    loop.ranking = dict(ranked[: checkpoint.keep_best])
    return loop.step in loop.ranking


def enter_evaluation(
    loop: LoopState, record: Mapping[str, Any], run: Run, log: Callable[[dict[str, Any]], None]
) -> bool:
    """Do what `note_evaluation` does, and log if early stopping ends the run with it."""
    is_kept = note_evaluation(loop, record, run.train, run.checkpoint)
    _note_early_stop(loop, run.train, log)
    return is_kept


def _note_early_stop(loop: LoopState, train: TrainConfig, log: Callable[[dict[str, Any]], None]) -> bool:
    """Log once if early stopping ends the run here; return whether it was logged now.

    Whoever follows the log learns of an end before `train.max_steps` from nothing else.
    """
    is_early = out_of_patience(loop, train) and loop.step < train.max_steps
    if not is_early or loop.early_stop_step == loop.step:
        return False
    loop.early_stop_step, lasting = loop.step, loop.evaluations_without_improvement
    log({"kind": EARLY_STOP, "step": loop.step, "evaluations_without_improvement": lasting})
    return True


def defined(value: Any) -> Any:
    """Return a value of a record; None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _evaluate(loop: LoopState, hooks: Hooks, run: Run, stop: StopSignal, incidents: Incidents) -> bool:
    """Validate, log and enter the result; return whether it is among the best ones that are kept."""
    record = hooks.evaluate(stop.received) if hooks.evaluate else None
    if record is None:
        return False
    with _saved_first(hooks):
        words = incidents.note_evaluation(loop.step, "valid", record[VALID_LOSS])
    if words:
        hooks.say(words)
    hooks.log({"kind": "eval", "step": loop.step, **record})
    if hooks.downstream is not None and hooks.downstream.is_due(loop.step):
        # What is abandoned is made up for by the next start.
        loop.downstream_step = loop.step
        record = {**record, **(hooks.downstream.measure(loop.step, stop.received) or {})}
    return enter_evaluation(loop, record, run, hooks.log)


def _save(loop: LoopState, hooks: Hooks, stop: StopSignal) -> None:
    """Save once the data that were trained on are verified, also when the run is stopped."""
    is_said = False
    while not hooks.verified():
        if stop.received() and not is_said:
            hooks.say("stopping once the training data are verified and the state is saved")
            is_said = True
    if stop.limit is not None:
        stop.limit.save_begins()
    hooks.save(loop)
    if stop.limit is not None:
        stop.limit.go_on()
        if not hooks.saver.is_writing:
            stop.limit.save_ends()


def _finish_save(hooks: Hooks, stop: StopSignal) -> None:
    hooks.saver.finish()
    if stop.limit is not None:
        stop.limit.save_ends()


@contextmanager
def _saved_first(hooks: Hooks) -> Iterator[None]:
    """Finish what is being saved before an error that every rank raises; it is a good state of before.

    All ranks finish together, which after the loss of a worker of this rank would wait for the others.
    """
    try:
        yield
    except LostWorkerError:
        raise
    except (MachineError, RollBack):
        hooks.saver.finish()
        raise


def _raise_if(stop: StopSignal, loop: LoopState, hooks: Hooks) -> None:
    if stop.stopping:
        hooks.verified()  # an alarm has an error of its own, which this raises
        raise StoppedBySignal(
            stop.reason,
            f" after step {loop.step}, which is saved; start the same command again to continue",
        )


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
