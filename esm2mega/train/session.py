"""Runs the loop for pretraining and fine-tuning: resumes, logs, evaluates, saves, and reports the end.

There is no arithmetic here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import Evaluated, best_checkpoint, prune
from esm2mega.checkpoint.digests import CURE
from esm2mega.checkpoint.fallback import Verification, set_aside, share_of
from esm2mega.checkpoint.run_lock import owning
from esm2mega.checkpoint.saver import Saver, remove_partial
from esm2mega.checkpoint.store import load_training_state, load_weights
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import resolve_max_steps
from esm2mega.config.resolved import save_resolved
from esm2mega.config.schema import CheckpointConfig, Run
from esm2mega.config.validate import validate
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.store.verification import BackgroundVerification
from esm2mega.data.stream.loader import PackStream
from esm2mega.errors import DamagedError
from esm2mega.files import real_path
from esm2mega.parallel.errors import first_error, on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.external import open_trackers
from esm2mega.report.log import LOG_NAME, JsonlLog, utc_now
from esm2mega.report.progress import Progress
from esm2mega.train.build import Built
from esm2mega.train.downstream import DownstreamHook, Measurement
from esm2mega.train.incidents import FILE_NAME, Incidents, RollBack
from esm2mega.train.loop import Evaluation, Hooks, LoopState, begin_evaluations, enter_evaluation, fit
from esm2mega.train.losses import Means
from esm2mega.train.signals import StopSignal
from esm2mega.train.sound import is_sound
from esm2mega.train.start import open_training_start
from esm2mega.train.step import StepResult, TrainState
from esm2mega.train.time_limit import TimeLimit
from esm2mega.train.wording import (
    describe_ending,
    describe_run,
    describe_skipped,
    describe_small_data,
    describe_start,
)

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
        downstream: Measures the model besides its loss, after evaluations; None for nothing.
        verification: Compares the files of the data with their checksums, in the background on one rank;
            None for data without any. Closed at the end.
        begin: Writes further files, on one process, when the run may write into its directory; None for none.
        tested: Takes the checkpoint that was tested and its step, on all ranks together, and writes what the
            test found; None for nothing.
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
    downstream: Measurement | None = None
    begin: Callable[[], None] | None = None
    tested: Callable[[Path, int], None] | None = None


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
    stop = StopSignal(ranks.device, limit=limit)
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

        def enter() -> None:
            with owning(run.run_dir):
                layout.write_state(start.path, state)

        on_one_rank(enter)
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
        if session.verification is not None:
            stack.callback(session.verification.close)
        if resumed is not None:
            loop = _resume(run, resumed, session)
            incidents.load_state_dict(resumed.state.get("incidents") or {})
        stream.skip(incidents.skipped)
        renewed = _begin_evaluations(loop, session.eval_recipe, session.eval_proteins)
        begun = replace(loop)
        # From here on this start writes into run_dir, which no other may do at the same time.
        on_one_rank(lambda: stack.enter_context(owning(run.run_dir)))
        trackers = open_trackers(run.logging, run.run_dir, asdict(run), loop.step) if ranks.is_main else []
        for tracker in trackers:
            stack.callback(tracker.close)
        if session.begin is not None:
            on_one_rank(session.begin)
        log = None
        if ranks.is_main:
            # Last of all that can fail: the log of an earlier start is changed only once this one will run.
            log, said = _open_log(Path(run.run_dir) / LOG_NAME, is_fresh, loop.step)
            stack.callback(log.close)
            remove_partial(run.run_dir)
            if resumed is not None:
                # A kill may have come between the save of a checkpoint and the removal of others.
                prune(run.run_dir, run.checkpoint, resumed.path)
            save_resolved(run, Path(run.run_dir) / "config.yaml")
            lines = [*describe_run(run, ranks, state.model), *session.banner]
            lines += [*describe_small_data(run.train, stream), *built.banner, *describe_skipped(incidents)]
            print("\n".join(lines + describe_start(run, start) + renewed + said), file=sys.stderr, flush=True)
        progress = stack.enter_context(
            Progress(run.train.max_steps, session.name, "step", enabled=ranks.is_main, initial=loop.step)
        )

        def write(record: dict[str, Any]) -> None:
            if log is not None:
                log.write({**record, "time": utc_now()})
            for tracker in trackers:
                # The record of a test may name an earlier step, to which trackers do not go back.
                tracker.write({**record, "step": loop.step})
            for kind, split, words in (("eval", "valid", "validation"), ("test", "test", "test")):
                if record["kind"] == kind:
                    progress.message(f"step {record['step']}: {words} {session.result(record, split)}")

        def show(result: StepResult) -> None:
            loss = result.metrics["loss"]
            progress.update(1, loss="none" if loss is None else f"{loss:.4f}", lr=f"{result.lr:.2e}")

        hook = None
        if session.downstream is not None:
            stack.callback(session.downstream.forget)
            hook = DownstreamHook(session.downstream, run, state.model, ranks, write, progress.message)
        saver = stack.enter_context(Saver(run.checkpoint.async_save))
        saved_last = None if resumed is None else resumed.path

        def save(loop: LoopState) -> None:
            directory = layout.step_dir(run.run_dir, loop.step)
            extra_state = {**session.extra_state, **built.extra_state}
            saved = _saved_state(loop, run.checkpoint, state, stream, incidents, extra_state)
            saver.finish()
            if saved_last is not None and real_path(saved_last) == real_path(directory):
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

        if hook is not None and not is_fresh:
            found = hook.take_up(Path(run.run_dir) / LOG_NAME, loop.step, loop.downstream_step)
            # Without the evaluation that it belongs to, which is made anew, it will be measured anew.
            if found and loop.evaluation is not None:
                enter_evaluation(loop, {**loop.evaluation, **found}, run, write)
                save(loop)
        hooks = Hooks(
            write,
            show,
            progress.message,
            session.evaluation("valid", run.train.eval_batches),
            _test(run, session, loop),
            lambda probe: is_sound(state, probe, ranks),
            save,
            saver,
            session.training_values,
            *_verification_hooks(session.verification),
            downstream=hook,
        )
        fit(run, state, stream, loop, hooks, ranks, stop, incidents)
    if ranks.is_main:
        print(describe_ending(run, begun, loop, saved_last), file=sys.stderr, flush=True)
    return loop


def resolve_epochs(run: Run, open_stream: Callable[[], PackStream[Any]]) -> Run:
    """Return a run given in epochs with its length in steps, and any other run unchanged.

    The last step may hold fewer proteins.

    Args:
        run: The configuration.
        open_stream: Opens the training batches.
    """
    if run.train.max_epochs is None:
        return run
    with open_stream() as stream:
        packs_per_step = run.train.global_batch_tokens // run.train.micro_batch_tokens
        run = resolve_max_steps(run, stream.num_steps(packs_per_step))
    validate(run, world_size_from_environment())
    return run


def _resume(run: Run, start: StartPoint, session: Session) -> LoopState:
    state = session.built.state
    load_training_state(start.path, state.model, state.optimizer, session.built.saved)
    try:
        session.stream.load_state_dict(start.state["data"])
        state.schedule.load_state_dict(start.state["schedule"])
        loop = LoopState.from_dict(start.state["loop"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        path = start.path / layout.STATE
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DamagedError(path, f"is not what a training writes ({reason})", CURE) from error
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

    def with_best_weights(abandon: Callable[[], bool]) -> dict[str, Any] | None:
        best = _best_to_load(run, loop.step)
        path, step = layout.step_dir(run.run_dir, loop.step), loop.step
        if best is not None:
            path, step = best.path, best.step
            load_weights(path, session.built.state.model, session.built.saved)
        record = evaluate(abandon)
        if record is not None and session.tested is not None:
            session.tested(path, step)
        return None if record is None else {**record, "step": step}

    return with_best_weights


def _best_to_load(run: Run, step: int) -> Evaluated | None:
    """Return the best checkpoint, verified; None if there is none or it is that of `step`, which is loaded.

    All ranks call this together. A damaged one is set aside, and the next one is the best.
    """
    while True:
        best = on_one_rank(lambda: best_checkpoint(run.run_dir))
        if best is None or best.step == step or not run.checkpoint.verify:
            return None if best is None or best.step == step else best
        error = first_error(partial(_verify_share, best.path))
        if error is None:
            return best
        if not isinstance(error, DamagedError):
            raise error
        on_one_rank(partial(set_aside, best.path, error))


def _verify_share(checkpoint: Path, rank: int, num_ranks: int) -> None:
    """Verify a rank's share of the files of tensors, and on rank 0 before it all other files."""
    if rank == 0:
        Verification(with_large=False).check(checkpoint)
    share_of(checkpoint, rank, num_ranks)


def _begin_evaluations(loop: LoopState, recipe: str, proteins: str | None) -> list[str]:
    """Enter how evaluations are made into the state; say so if it is not as in the checkpoint."""
    before = loop.eval_recipe
    if not begin_evaluations(loop, recipe, proteins):
        return []
    what = f"recipe {recipe} in place of {before or 'that of an earlier version'}"
    if before == recipe:
        what = "other validation proteins than before"
    return [f"eval     {what}: best and early stopping start anew"]


def data_set(
    use: str, path: str | Path, lengths: npt.NDArray[Any], sources: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return an entry of `esm2mega.checkpoint.layout.DATA_SETS`, which a reader of the checkpoint is told.

    Args:
        use: What the proteins are for: ``train``, ``valid`` or ``test``.
        path: Their file or store; of it the name is kept, without the folders that hold it.
        lengths: Number of residues of each protein, ``[n]``.
        sources: The files that a token store was made from, as its manifest lists them.
    """
    name = Path(path).name or str(path)
    residues = int(lengths.sum(dtype=np.int64))
    files = [[Path(str(source["name"])).name, str(source["sha256"])] for source in sources]
    return {"use": use, "name": name, "proteins": len(lengths), "residues": residues, "sources": files}


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
