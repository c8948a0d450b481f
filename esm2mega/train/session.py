"""Runs the loop for pretraining and fine-tuning: resumes, logs, evaluates, saves, and reports the end.

There is no arithmetic here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import Evaluated, best_checkpoint, prune
from esm2mega.checkpoint.fallback import set_aside, share_of
from esm2mega.checkpoint.run_lock import owning
from esm2mega.checkpoint.saver import Saver, remove_partial
from esm2mega.checkpoint.store import load_training_state, load_weights
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import resolve_max_steps, save_resolved
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import CheckpointConfig, Run, TrainConfig, flatten
from esm2mega.config.validate import validate
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.store.verification import BackgroundVerification
from esm2mega.data.stream.loader import PackStream
from esm2mega.errors import DamagedError
from esm2mega.parallel.errors import first_error, on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.external import open_trackers
from esm2mega.report.log import LOG_NAME, JsonlLog
from esm2mega.report.progress import Progress
from esm2mega.train.build import Built
from esm2mega.train.loop import Evaluation, Hooks, LoopState, begin_evaluations, fit, out_of_patience
from esm2mega.train.losses import Means
from esm2mega.train.step import StepResult, TrainState

_VERIFICATION_SECONDS = 1.0
"""The ranks wait so long at once for the verification of the data, and then look for signals."""


@dataclass(frozen=True)
class Session:
    """Holds the objects of one training, as pretraining or fine-tuning made them.

    Attributes:
        name: Name of the command, for the progress bar.
        built: Model and optimizer, and what checkpoints hold of them.
        stream: Training batches, at their beginning; closed at the end.
        evaluation: Takes a split and a limit of packs (0 for none) and makes the evaluation; None without
            such a split.
        eval_recipe: Hash of the recipe of the evaluations, which stands in each of their records.
        eval_proteins: Hash of the validation proteins; None without any.
        extra_state: Further entries of ``train_state.json``.
        banner: Further lines that are printed at the start of the run.
        result: Takes an evaluation record and its split, and words it for a reader.
        training_values: Takes the metrics of a step and returns the values of a training record.
        verification: Compares the files of the data with their checksums, in the background on one rank;
            None for data without any. Closed at the end.
    """

    name: str
    built: Built
    stream: PackStream[Any]
    evaluation: Callable[[str, int], Evaluation | None]
    eval_recipe: str
    eval_proteins: str | None
    extra_state: Mapping[str, Any]
    banner: Sequence[str]
    result: Callable[[dict[str, Any], str], str]
    training_values: Callable[[Means], Means]
    verification: BackgroundVerification | None = None


def run_session(run: Run, ranks: Ranks, session: Session, start: StartPoint | None) -> LoopState:
    """Resume if there is something to resume, and train to the end of the run; all ranks call this together.

    Args:
        run: The configuration.
        ranks: Where this process stands.
        session: The objects, with initial weights.
        start: Checkpoint to resume, or the source of the initial weights; None for neither.

    Returns:
        The final state of the loop, the same on every rank.
    """
    built, stream = session.built, session.stream
    state = built.state
    resumed = start if start is not None and start.is_resumed else None
    loop = LoopState()
    with ExitStack() as stack:
        stack.enter_context(stream)
        if session.verification is not None:
            stack.callback(session.verification.close)
        if resumed is not None:
            loop = _resume(run, resumed, session)
        renewed = _begin_evaluations(loop, session.eval_recipe, session.eval_proteins)
        begun = replace(loop)
        # From here on this start writes into run_dir, which no other may do at the same time.
        on_one_rank(lambda: stack.enter_context(owning(run.run_dir)))
        trackers = open_trackers(run.logging, run.run_dir, asdict(run), loop.step) if ranks.is_main else []
        for tracker in trackers:
            stack.callback(tracker.close)
        log = None
        if ranks.is_main:
            # Last of all that can fail: the log of an earlier start is changed only once this one will run.
            log, said = _open_log(Path(run.run_dir) / LOG_NAME, resumed is None, loop.step)
            stack.callback(log.close)
            remove_partial(run.run_dir)
            save_resolved(run, Path(run.run_dir) / "config.yaml")
            lines = [*_announcement(run, ranks, state.model), *session.banner]
            lines += [*_small_data(run.train, stream), *built.banner]
            print("\n".join(lines + _start(run, start) + renewed + said), file=sys.stderr, flush=True)
        progress = stack.enter_context(
            Progress(run.train.max_steps, session.name, "step", enabled=ranks.is_main, initial=loop.step)
        )

        def write(record: dict[str, Any]) -> None:
            if log is not None:
                log.write(record)
            for tracker in trackers:
                # The record of a test may name an earlier step, to which trackers do not go back.
                tracker.write({**record, "step": loop.step})
            for kind, split, words in (("eval", "valid", "validation"), ("test", "test", "test")):
                if record["kind"] == kind:
                    progress.message(f"step {record['step']}: {words} {session.result(record, split)}")

        def show(result: StepResult) -> None:
            loss = result.metrics["loss"]
            progress.update(1, loss="none" if loss is None else f"{loss:.4f}", lr=f"{result.lr:.2e}")

        saver = stack.enter_context(Saver(run.checkpoint.async_save))
        saved_last = None if resumed is None else resumed.path

        def save(loop: LoopState) -> None:
            directory = layout.step_dir(run.run_dir, loop.step)
            extra_state = {**session.extra_state, **built.extra_state}
            saved = _saved_state(loop, run.checkpoint, state, stream, extra_state)
            saver.finish()
            if saved_last is not None and saved_last.resolve() == directory.resolve():
                # The weights are saved already; only what is known about them has changed.
                if ranks.is_main:
                    layout.write_state(directory, saved)
                return

            def completed() -> None:
                nonlocal saved_last
                saved_last = directory
                if ranks.is_main:
                    prune(run.run_dir, run.checkpoint, directory)

            what = (state.model, state.optimizer, run, saved, built.auxiliary, built.saved)
            saver.save(directory, *what, then=completed)

        hooks = Hooks(
            write,
            show,
            session.evaluation("valid", run.train.eval_batches),
            _test(run, session, loop),
            save,
            saver,
            session.training_values,
            *_verification_hooks(session.verification),
        )
        fit(run, state, stream, loop, hooks, ranks)
    if ranks.is_main:
        print(_ending(run, begun, loop, saved_last), file=sys.stderr, flush=True)
    return loop


def resolve_epochs(run: Run, open_stream: Callable[[], PackStream[Any]]) -> Run:
    """Return a run given in epochs with its length in steps, and any other run unchanged.

    The last step may be filled up with padding.

    Args:
        run: The configuration.
        open_stream: Opens the training batches.
    """
    if run.train.max_epochs is None:
        return run
    with open_stream() as stream:
        packs_per_step = run.train.global_batch_tokens // run.train.micro_batch_tokens
        run = resolve_max_steps(run, -(-stream.num_packs() // packs_per_step))
    validate(run, world_size_from_environment())
    return run


def _resume(run: Run, start: StartPoint, session: Session) -> LoopState:
    state = session.built.state
    load_training_state(start.path, state.model, state.optimizer, session.built.saved)
    session.stream.load_state_dict(start.state["data"])
    state.schedule.load_state_dict(start.state["schedule"])
    loop = LoopState.from_dict(start.state["loop"])
    if start.run.checkpoint.best_metric != run.checkpoint.best_metric:
        loop.restart_best()
    # What is not there, since it belongs to another run or was not kept, keeps no others from being saved.
    loop.ranking = on_one_rank(
        lambda: {
            step: value
            for step, value in loop.ranking.items()
            if layout.is_complete(layout.step_dir(run.run_dir, step))
        }
    )
    return loop


def _verification_hooks(
    verification: BackgroundVerification | None,
) -> tuple[Callable[[], bool], Callable[[], bool]]:
    """Return what the loop calls to learn of the verification; see `Hooks`."""
    if verification is None:
        return lambda: True, lambda: False
    is_over = False

    def verified() -> bool:
        # A broadcast over the world each time, until rank 0 is through.
        nonlocal is_over
        is_over = is_over or on_one_rank(lambda: verification.wait(_VERIFICATION_SECONDS))
        return is_over

    return verified, lambda: verification.problem is not None


def _test(run: Run, session: Session, loop: LoopState) -> Evaluation | None:
    """Make the evaluation of the test split, in fine-tuning with the best weights of the run.

    The last weights, with which a resumed run would go on, have been saved by then.
    """
    evaluate = session.evaluation("test", 0)
    if evaluate is None or run.task.kind is None:
        return evaluate

    def with_best_weights(abandon: Callable[[], bool]) -> dict[str, float] | None:
        best = _best_to_load(run, loop.step)
        if best is None:
            return evaluate(abandon)
        load_weights(best.path, session.built.state.model, session.built.saved)
        record = evaluate(abandon)
        return None if record is None else {**record, "step": best.step}

    return with_best_weights


def _best_to_load(run: Run, step: int) -> Evaluated | None:
    """Return the best checkpoint, verified; None if there is none or it is that of `step`, which is loaded.

    All ranks call this together. A damaged one is set aside, and the next one is the best.
    """
    while True:
        best = on_one_rank(lambda: best_checkpoint(run.run_dir))
        if best is None or best.step == step or not run.checkpoint.verify:
            return None if best is None or best.step == step else best
        error = first_error(partial(share_of, best.path))
        if error is None:
            return best
        if not isinstance(error, DamagedError):
            raise error
        on_one_rank(partial(set_aside, best.path, error))


def _begin_evaluations(loop: LoopState, recipe: str, proteins: str | None) -> list[str]:
    """Enter how evaluations are made into the state; say so if it is not as in the checkpoint."""
    before = loop.eval_recipe
    if not begin_evaluations(loop, recipe, proteins):
        return []
    what = f"recipe {recipe} in place of {before or 'that of an earlier version'}"
    if before == recipe:
        what = "other validation proteins than before"
    return [f"eval     {what}: best and early stopping start anew"]


def _saved_state(
    loop: LoopState,
    settings: CheckpointConfig,
    state: TrainState,
    stream: PackStream[Any],
    extra_state: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of ``train_state.json``.

    It has no generator states, since data, masks and weights are pure functions of seed and position.
    """
    return {
        "step": loop.step,
        "valid_loss": loop.valid_loss,
        "best_metric": settings.best_metric if settings.keep_best else None,
        "loop": loop.to_dict(),
        "data": stream.state_dict(),
        "schedule": state.schedule.state_dict(),
        **extra_state,
    }


def _open_log(path: Path, is_fresh: bool, step: int) -> tuple[JsonlLog, list[str]]:
    """Open the log after the records up to `step`; say what became of the others."""
    old = JsonlLog.set_aside(path) if is_fresh else None
    log = JsonlLog(path)
    if old is not None:
        return log, [f"log      that of an earlier start is now {old}"]
    dropped = log.truncate_after(step)
    behind = f"log      {dropped} record{'s' * (dropped > 1)} behind step {step} dropped from {path}"
    return log, [behind] if dropped else []


def _stages(config: Any) -> str:
    """Return the number of layers of each pipeline stage, as in 17+16."""
    layout = config.pipeline_model_parallel_layout
    ranks = range(layout.pipeline_model_parallel_size)
    return "+".join(str(layout.get_num_layers_to_build(vp_stage=0, pp_rank=rank)) for rank in ranks)


def _announcement(run: Run, ranks: Ranks, model: list[Any]) -> list[str]:
    """Describe the model, the layout and the batch of the run."""
    config = unwrap_model(model)[0].config
    return [
        f"model    {run.model.size or 'own shape'}: {shape_of(run.model)}; {run.model.precision}, "
        f"attention {config.packed_attention}",
        f"layout   {ranks.world_size} x {ranks.device.type}: "
        f"TP {ranks.tp_size}, PP {ranks.pp_size}, DP {ranks.dp_size}"
        + (", SP" if run.parallel.sequence_parallel else "")
        + (f"; stages of {_stages(config)} layers" if config.pipeline_model_parallel_layout else ""),
        f"batch    {run.train.global_batch_tokens} tokens a step in packs of {run.train.micro_batch_tokens}",
    ]


def _small_data(train: TrainConfig, stream: PackStream[Any]) -> list[str]:
    """Say that a step takes more proteins than there are, since it then takes some of them repeatedly."""
    passes = stream.passes_of(train.global_batch_tokens // train.micro_batch_tokens)
    if passes <= 1.0:
        return []
    size = stream.samples.size
    line = f"data     data.train has {size} proteins, and a step takes each of them {passes:.3g} times"
    if size == 1:
        line = f"data     data.train has one protein, and a step takes it {passes:.3g} times"
    if train.max_epochs is not None:
        steps = "1 step" if train.max_steps == 1 else f"{train.max_steps} steps"
        line += f", so that train.max_epochs={train.max_epochs} is {steps}"
    return [
        f"{line}; for smaller steps lower train.global_batch_tokens={train.global_batch_tokens} and "
        f"train.micro_batch_tokens={train.micro_batch_tokens}"
    ]


def _start(run: Run, start: StartPoint | None) -> list[str]:
    """Describe where the run is written to and what it starts from."""
    if start is None:
        return [f"run      {run.run_dir}"]
    if not start.is_resumed:
        return [f"run      {run.run_dir}, weights from {start.path}"]
    lines = [f"run      {run.run_dir}, resumed from {start.path.name} at step {start.state['step']}"]
    if run.init_from is not None:
        lines[0] += f"; init_from={run.init_from} is not used"
    before, now = flatten(start.run), flatten(run)
    changed = [
        f"{key} {before[key]} -> {now[key]}"
        for key in now
        if before[key] != now[key] and key not in ("run_dir", "checkpoint.resume")
    ]
    if changed:
        lines.append(f"changed since the checkpoint: {', '.join(changed)}")
    return lines


def _ending(run: Run, begun: LoopState, loop: LoopState, last: Path | None) -> str:
    """Describe in one line how the run ended, and where its last and its best weights are."""
    if out_of_patience(loop, run.train):
        count = loop.evaluations_without_improvement
        text = f"stopped early: no improvement in {count} evaluations; step {loop.step}, checkpoint {last}"
    elif loop == begun:
        text = f"nothing to do: step {loop.step} of {run.train.max_steps} is done, checkpoint {last}"
    else:
        text = f"done: step {loop.step}, checkpoint {last}"
    best = best_checkpoint(run.run_dir)
    if best is not None and best.step == loop.step:
        text += f", which is the best {best}"
    elif best is not None:
        text += f"; best {best}: step {best.step}, checkpoint {best.path}"
    elif loop.best_value is not None and not run.checkpoint.keep_best:
        value = f"{run.checkpoint.best_metric} ({loop.best_value:.4f})"
        text += f"; best by {value}: step {loop.best_step}, not kept (checkpoint.keep_best=0)"
    return text
