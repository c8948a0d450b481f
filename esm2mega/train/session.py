"""Runs the loop for pretraining and fine-tuning: resumes, logs, evaluates, saves, and reports the end.

There is no arithmetic here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import best_checkpoint, prune
from esm2mega.checkpoint.store import load_training_state, load_weights, save_checkpoint
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import resolve_max_steps, save_resolved
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import CheckpointConfig, Run, TrainConfig, flatten
from esm2mega.config.validate import validate
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.stream.loader import PackStream
from esm2mega.files import first_of
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.external import open_trackers
from esm2mega.report.log import LOG_NAME, JsonlLog
from esm2mega.report.progress import Progress
from esm2mega.train.build import Built
from esm2mega.train.finite import is_sound
from esm2mega.train.incidents import FILE_NAME, Incidents, RollBack
from esm2mega.train.loop import Evaluation, Hooks, LoopState, begin_evaluations, fit, out_of_patience
from esm2mega.train.losses import Means
from esm2mega.train.signals import StopSignal, kept_from_helpers
from esm2mega.train.start import open_training_start
from esm2mega.train.step import StepResult, TrainState
from esm2mega.train.time_limit import TimeLimit


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


def run_session(
    run: Run,
    ranks: Ranks,
    make: Callable[[StartPoint | None], Session],
    start: StartPoint | None,
    begun: float | None = None,
) -> LoopState:
    """Resume if there is something to resume, and train to the end of the run; all ranks call this together.

    Where `train.on_nonfinite` leads back to an earlier state, everything is made anew and resumed from there.

    Args:
        run: The configuration.
        ranks: Where this process stands.
        make: Makes the objects, with initial weights, for the checkpoint that it gets.
        start: Checkpoint to resume, or the source of the initial weights; None for neither.
        begun: Reading of `time.monotonic` from which `train.max_minutes` counts; None for now.

    Returns:
        The final state of the loop, the same on every rank.
    """
    incidents = Incidents(Path(run.run_dir) / FILE_NAME, run.train.on_nonfinite)
    limit = None
    if run.train.max_minutes is not None and ranks.is_main:
        limit = TimeLimit(run.train.max_minutes, begun)
    stop = StopSignal(ranks.device, limit)
    is_fresh = start is None or not start.is_resumed
    while True:
        try:
            return _run_once(run, ranks, make(start), start, stop, incidents, is_fresh)
        except RollBack as back:
            words = str(back)
        # Behind the block, the error and with it the old model are gone.
        if ranks.is_main:
            print(f"esm2mega: {words}", file=sys.stderr, flush=True)
        start, is_fresh = _last_good(run, incidents), False


def _last_good(run: Run, incidents: Incidents) -> StartPoint | None:
    """Open the newest checkpoint of the run, or what the run started from; enter the skipped packs there.

    The checkpoint then knows of them if this process ends before it saves the next one.
    """
    has_own = on_one_rank(lambda: bool(layout.find_checkpoints(run.run_dir)[0]))
    resume = "auto" if has_own else run.checkpoint.resume
    start = open_training_start(replace(run, checkpoint=replace(run.checkpoint, resume=resume)))
    if has_own and start is not None:
        state = {**start.state, "incidents": incidents.state_dict()}
        on_one_rank(lambda: layout.write_state(start.path, state))
    return start


def _run_once(
    run: Run,
    ranks: Ranks,
    session: Session,
    start: StartPoint | None,
    stop: StopSignal,
    incidents: Incidents,
    is_fresh: bool,
) -> LoopState:
    """Train until the end, or until the run must go on from an earlier state."""
    built, stream = session.built, session.stream
    state = built.state
    resumed = start if start is not None and start.is_resumed else None
    loop = LoopState()
    with ExitStack() as stack:
        stack.enter_context(stream)
        if resumed is not None:
            loop = _resume(run, resumed, session)
            incidents.load_state_dict(resumed.state.get("incidents") or {})
        stream.skip(incidents.skipped)
        renewed = _begin_evaluations(loop, session.eval_recipe, session.eval_proteins)
        begun = replace(loop)
        trackers = open_trackers(run.logging, run.run_dir, asdict(run), loop.step) if ranks.is_main else []
        for tracker in trackers:
            stack.callback(tracker.close)
        log = None
        if ranks.is_main:
            # Last of all that can fail: the log of an earlier start is changed only once this one will run.
            log, said = _open_log(Path(run.run_dir) / LOG_NAME, is_fresh, loop.step)
            stack.callback(log.close)
            save_resolved(run, Path(run.run_dir) / "config.yaml")
            lines = [*_announcement(run, ranks, state.model), *session.banner]
            lines += [*_small_data(run.train, stream), *built.banner, *_skipped(incidents)]
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

        saved_last = None if resumed is None else resumed.path

        def save(loop: LoopState) -> None:
            nonlocal saved_last
            directory = layout.step_dir(run.run_dir, loop.step)
            extra_state = {**session.extra_state, **built.extra_state}
            saved = _saved_state(loop, run.checkpoint, state, stream, incidents, extra_state)
            if saved_last is not None and saved_last.resolve() == directory.resolve():
                # The weights are saved already; only what is known about them has changed.
                if ranks.is_main:
                    layout.write_state(directory, saved)
                return
            with kept_from_helpers():
                save_checkpoint(
                    *(directory, state.model, state.optimizer, run, saved, built.auxiliary, built.saved)
                )
            saved_last = directory
            if ranks.is_main:
                prune(run.run_dir, run.checkpoint, directory)

        hooks = Hooks(
            write,
            show,
            progress.message,
            session.evaluation("valid", run.train.eval_batches),
            _test(run, session, loop),
            lambda probe: is_sound(state, probe, ranks),
            save,
            session.training_values,
        )
        fit(run, state, stream, loop, hooks, ranks, stop, incidents)
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


def _test(run: Run, session: Session, loop: LoopState) -> Evaluation | None:
    """Make the evaluation of the test split, in fine-tuning with the best weights of the run.

    The last weights, with which a resumed run would go on, have been saved by then.
    """
    evaluate = session.evaluation("test", 0)
    if evaluate is None or run.task.kind is None:
        return evaluate

    def with_best_weights(abandon: Callable[[], bool]) -> dict[str, float] | None:
        best = on_one_rank(lambda: best_checkpoint(run.run_dir))
        if best is None or best.step == loop.step:
            return evaluate(abandon)
        load_weights(best.path, session.built.state.model, session.built.saved)
        record = evaluate(abandon)
        return None if record is None else {**record, "step": best.step}

    return with_best_weights


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
    incidents: Incidents,
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
        "incidents": incidents.state_dict(),
        **extra_state,
    }


def _open_log(path: Path, is_fresh: bool, step: int) -> tuple[JsonlLog, list[str]]:
    """Open the log after the records up to `step`; say what became of the others."""
    old = JsonlLog.set_aside(path) if is_fresh else None
    if is_fresh:
        JsonlLog.set_aside(path.with_name(FILE_NAME))
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


def _skipped(incidents: Incidents) -> list[str]:
    """Say which packs are left out of training."""
    packs = [str(number) for number in sorted(incidents.skipped)]
    return [f"data     without pack{'s' * (len(packs) > 1)} {first_of(packs)}; see {incidents.path}"] * bool(
        packs
    )


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
