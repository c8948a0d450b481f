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
from esm2mega.checkpoint.store import load_training_state, save_checkpoint
from esm2mega.config.load import resolve_max_steps, save_resolved
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run, TrainConfig, flatten
from esm2mega.config.validate import validate, world_size_from_environment
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.stream.loader import PackStream
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.external import open_trackers
from esm2mega.report.log import LOG_NAME, JsonlLog
from esm2mega.report.progress import Progress
from esm2mega.train.build import Built
from esm2mega.train.loop import Evaluation, Hooks, LoopState, fit, out_of_patience
from esm2mega.train.signals import kept_from_helpers
from esm2mega.train.step import StepResult, TrainState


@dataclass(frozen=True)
class Session:
    """Holds the objects of one training, as pretraining or fine-tuning made them.

    Attributes:
        name: Name of the command, for the progress bar.
        built: Model and optimizer, and what checkpoints hold of them.
        stream: Training batches, at their beginning; closed at the end.
        evaluation: Takes a split and a limit of packs (0 for none) and makes the evaluation; None without
            such a split.
        extra_state: Further entries of ``train_state.json``.
        banner: Further lines that are printed at the start of the run.
        result: Takes an evaluation record and its split, and words it for a reader.
        training_values: Takes the metrics of a step and returns the values of a training record.
    """

    name: str
    built: Built
    stream: PackStream[Any]
    evaluation: Callable[[str, int], Evaluation | None]
    extra_state: Mapping[str, Any]
    banner: Sequence[str]
    result: Callable[[dict[str, Any], str], str]
    training_values: Callable[[dict[str, float]], dict[str, float]]


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
        if resumed is not None:
            loop = _resume(resumed, session)
        begun = replace(loop)
        trackers = open_trackers(run.logging, run.run_dir, asdict(run), loop.step) if ranks.is_main else []
        for tracker in trackers:
            stack.callback(tracker.close)
        log = None
        if ranks.is_main:
            # Last of all that can fail: the log of an earlier start is changed only once this one will run.
            log, said = _open_log(Path(run.run_dir) / LOG_NAME, resumed is None, loop.step)
            stack.callback(log.close)
            save_resolved(run, Path(run.run_dir) / "config.yaml")
            lines = [*_announcement(run, ranks, state.model), *session.banner]
            lines += [*_small_data(run.train, stream), *built.banner]
            print("\n".join(lines + _start(run, start) + said), file=sys.stderr, flush=True)
        progress = stack.enter_context(
            Progress(run.train.max_steps, session.name, "step", enabled=ranks.is_main, initial=loop.step)
        )

        def write(record: dict[str, Any]) -> None:
            if log is not None:
                log.write(record)
            for tracker in trackers:
                tracker.write(record)
            for kind, split, words in (("eval", "valid", "validation"), ("test", "test", "test")):
                if record["kind"] == kind:
                    progress.message(f"step {record['step']}: {words} {session.result(record, split)}")

        def show(result: StepResult) -> None:
            progress.update(1, loss=f"{result.metrics['loss']:.4f}", lr=f"{result.lr:.2e}")

        saved_last = None if resumed is None else resumed.path

        def save(loop: LoopState) -> None:
            nonlocal saved_last
            directory = layout.step_dir(run.run_dir, loop.step)
            saved = _saved_state(loop, state, stream, {**session.extra_state, **built.extra_state})
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
                layout.prune(run.run_dir, run.checkpoint.keep_last, run.checkpoint.keep_best, directory)

        hooks = Hooks(
            write,
            show,
            session.evaluation("valid", run.train.eval_batches),
            session.evaluation("test", 0),
            save,
            session.training_values,
        )
        fit(run, state, stream, loop, hooks, ranks)
    if ranks.is_main:
        print(_ending(run.train, begun, loop, saved_last), file=sys.stderr, flush=True)
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


def _resume(start: StartPoint, session: Session) -> LoopState:
    state = session.built.state
    load_training_state(start.path, state.model, state.optimizer, session.built.saved)
    session.stream.load_state_dict(start.state["data"])
    state.schedule.load_state_dict(start.state["schedule"])
    return LoopState(**start.state["loop"])


def _saved_state(
    loop: LoopState, state: TrainState, stream: PackStream[Any], extra_state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of ``train_state.json``.

    It has no generator states, since data, masks and weights are pure functions of seed and position.
    """
    return {
        "step": loop.step,
        "valid_loss": loop.valid_loss,
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


def _ending(train: TrainConfig, begun: LoopState, loop: LoopState, checkpoint: Path | None) -> str:
    """Describe in one line how the run ended."""
    if out_of_patience(loop, train):
        text = (
            f"stopped early: no improvement in {loop.evaluations_without_improvement} evaluations, best "
            f"{loop.best_valid_loss:.4f} at step {loop.best_step}"
        )
        text += "" if loop.step == begun.step else f"; checkpoint {checkpoint}"
    elif loop == begun:
        text = f"nothing to do: step {loop.step} of {train.max_steps} is done"
    else:
        text = f"done: step {loop.step}, checkpoint {checkpoint}"
    return text
