"""Pretraining: build the objects of a run, resume or start, and hand them to the loop. No arithmetic."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.auxiliary import read_auxiliary
from esm2mega.checkpoint.store import load_training_state, save_checkpoint
from esm2mega.config.load import fix_length, save_resolved
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run, flatten
from esm2mega.config.validate import validate, world_size_from_environment
from esm2mega.convert.formats import detect
from esm2mega.convert.into_model import check_same_model, load_initial_weights
from esm2mega.data.batch import BatchSpec, token_counts
from esm2mega.data.cache import open_store
from esm2mega.data.loader import EvalPacks, TrainStream
from esm2mega.data.store import TokenStore
from esm2mega.errors import UserError
from esm2mega.lora.base import Base, needs_base
from esm2mega.lora.checkpoint import load_base, pinned
from esm2mega.lora.inject import adapters_line, check_stages, seed_dropout
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.report.external import open_trackers
from esm2mega.report.log import LOG_NAME, JsonlLog
from esm2mega.report.progress import Progress, show_bytes
from esm2mega.train.evaluate import evaluate, evaluation_record, unigram_log_probabilities
from esm2mega.train.loop import Evaluation, Hooks, LoopState, fit, out_of_patience
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from esm2mega.train.signals import kept_from_helpers
from esm2mega.train.step import StepResult, TrainState


def pretrain(run: Run, observe: Callable[[list[Any]], None] | None = None) -> LoopState:
    """Train as configured; every process of the world calls this with the same, validated configuration.

    Args:
        run: The configuration.
        observe: See `esm2mega.train.step.TrainState`.

    Returns:
        The final state of the loop, the same on every rank.

    Raises:
        UserError: Missing or unfit input.
        MachineError: Loss not finite, or a checkpoint could not be written.
        StoppedBySignal: A signal came and the state was saved.
    """
    if run.data.train is None:
        raise UserError("data.train is not set: give the token store to train on, as data.train=DIR")
    train_stores = [open_store(path, run, "data.train", show_bytes) for path in run.data.train_paths()]
    held_out = {
        split: _open_held_out(run, split, path, train_stores)
        for split, path in (("valid", run.data.valid), ("test", run.data.test))
        if path is not None
    }
    run = _with_steps(run, train_stores)
    resume_from = find_resume(run)
    init_from = find_init(run) if resume_from is None else None
    with process_groups(run.parallel, run.seed) as ranks:
        return _train(run, ranks, train_stores, held_out, resume_from, init_from, observe)


def _open_held_out(run: Run, split: str, path: str, train_stores: list[TokenStore]) -> TokenStore:
    store = open_store(path, run, f"data.{split}", show_bytes)
    for train_path, train_store in zip(run.data.train_paths(), train_stores, strict=True):
        if store.fingerprint == train_store.fingerprint:
            raise UserError(
                f"data.{split}={path} holds the same proteins as data.train={train_path}; its loss would not "
                "measure unseen proteins: give others"
            )
    return store


def _with_steps(run: Run, train_stores: list[TokenStore]) -> Run:
    """A run given in epochs with its length in steps, the last of which may be filled up with padding."""
    if run.train.max_epochs is None:
        return run
    with TrainStream(train_stores, _batch_spec(run)) as stream:
        packs_per_step = run.train.global_batch_tokens // run.train.micro_batch_tokens
        run = fix_length(run, -(-stream.num_packs() // packs_per_step))
    validate(run, world_size_from_environment())
    return run


def _batch_spec(run: Run) -> BatchSpec:
    return BatchSpec(run.data, run.train.micro_batch_tokens, run.seed, run.train.max_epochs)


def _train(
    run: Run,
    ranks: Ranks,
    train_stores: list[TokenStore],
    held_out: dict[str, TokenStore],
    resume_from: Path | None,
    init_from: Path | None,
    observe: Callable[[list[Any]], None] | None,
) -> LoopState:
    adapted = run.lora.rank is not None
    chunks = build_model(run.model, run.parallel, ranks.device, run.seed, adapted)
    auxiliary: dict[str, Tensor] = {}
    base: Base | None = None
    if adapted:
        base, auxiliary = load_base(run, chunks, resume_from)
        check_stages(chunks)
    elif resume_from is not None:
        auxiliary = read_auxiliary(resume_from)
    elif init_from is not None:
        auxiliary = load_initial_weights(init_from, run.model, chunks)
    model = wrap_data_parallel(chunks, run.model, run.parallel)
    optimizer = build_optimizer(run.optim, run, model)
    schedule = build_schedule(run.schedule, run.optim, optimizer)
    state = TrainState(model, optimizer, schedule, MLMLossReduction(), ranks.device, observe)
    if run.lora.rank is not None and run.lora.dropout:
        state.begin = partial(seed_dropout, run.seed)
    spec = _batch_spec(run)
    loop = LoopState()
    with ExitStack() as stack:
        stream = stack.enter_context(TrainStream(train_stores, spec, ranks.dp_rank, ranks.dp_size))
        counts = token_counts(stream.samples)
        if resume_from is not None:
            loop = _resume(resume_from, state, stream)
        begun = replace(loop)
        trackers = open_trackers(run.logging, run.run_dir, asdict(run), loop.step) if ranks.speaks else []
        for tracker in trackers:
            stack.callback(tracker.close)
        log = None
        if ranks.speaks:
            # Last of all that can fail: what an earlier start logged is touched when this one will run.
            log, said = _open_log(Path(run.run_dir) / LOG_NAME, resume_from, loop.step)
            stack.callback(log.close)
            save_resolved(run, Path(run.run_dir) / "config.yaml")
            lines = _announcement(run, ranks, stream, model) + (adapters_line(run, chunks) if adapted else [])
            print("\n".join(lines + _start(run, resume_from, init_from) + said), file=sys.stderr, flush=True)
        progress = stack.enter_context(
            Progress(run.train.max_steps, "pretrain", "step", enabled=ranks.speaks, initial=loop.step)
        )

        def write(record: dict[str, Any]) -> None:
            if log is not None:
                log.write(record)
            for tracker in trackers:
                tracker.write(record)
            for kind, split, words in (("eval", "valid", "validation"), ("test", "test", "test")):
                if record["kind"] == kind:
                    progress.message(
                        f"step {record['step']}: {words} loss {record[f'{split}_loss']:.4f}, perplexity "
                        f"{record[f'{split}_perplexity']:.2f} (residue frequencies: "
                        f"{record['unigram_loss']:.4f})"
                    )

        def show(result: StepResult) -> None:
            progress.update(1, loss=f"{result.metrics['loss']:.4f}", lr=f"{result.lr:.2e}")

        def evaluation(split: str, limit: int) -> Evaluation | None:
            if split not in held_out:
                return None

            def measure(abandon: Callable[[], bool]) -> dict[str, float] | None:
                packs = EvalPacks(held_out[split], spec, limit, ranks.dp_rank, ranks.dp_size)
                unigram = unigram_log_probabilities(counts, ranks.device)
                metrics = evaluate(model, MLMLossReduction(unigram), packs, ranks, abandon=abandon)
                return None if metrics is None else evaluation_record(metrics, split)

            return measure

        saved_last = resume_from

        def save(loop: LoopState) -> None:
            nonlocal saved_last
            directory = layout.step_dir(run.run_dir, loop.step)
            saved = _saved_state(loop, state, stream, counts)
            saved |= {} if base is None else base.as_state()
            if saved_last is not None and saved_last.resolve() == directory.resolve():
                # The weights are there; what is known about them has changed.
                if ranks.speaks:
                    layout.replace_state(directory, saved)
                return
            with kept_from_helpers():
                # Those of the base stay with it.
                kept = {} if adapted else auxiliary
                save_checkpoint(directory, model, optimizer, run, saved, kept, trained_only=adapted)
            saved_last = directory
            if ranks.speaks:
                layout.prune(run.run_dir, run.checkpoint.keep_last, run.checkpoint.keep_best, directory)

        valid, test = evaluation("valid", run.train.eval_batches), evaluation("test", 0)
        fit(run, state, stream, loop, Hooks(write, show, valid, test, save), ranks)
    if ranks.speaks:
        print(_ending(run, begun, loop, saved_last), file=sys.stderr, flush=True)
    return loop


def find_resume(run: Run) -> Path | None:
    """The checkpoint that `checkpoint.resume` means, or None for a fresh start.

    Raises:
        UserError: A fresh start was asked for in a directory that holds a run, or the named checkpoint is not
            there, or run_dir holds later ones, or it is of another model.
    """
    complete, incomplete = layout.find_checkpoints(run.run_dir)
    found: Path | None
    if run.checkpoint.resume not in ("auto", "never"):
        found = layout.resolve_checkpoint(run.checkpoint.resume)
        _refuse_later(run, found, complete)
    else:
        if run.checkpoint.resume == "never" and complete:
            raise UserError(
                f"checkpoint.resume=never, but {run.run_dir} holds checkpoints up to {complete[-1].name}; "
                "choose another run_dir, or checkpoint.resume=auto to go on"
            )
        for directory in incomplete:
            if os.environ.get("RANK", "0") == "0":
                print(f"esm2mega: ignoring {directory}: it has no {layout.COMPLETE}", file=sys.stderr)
        found = complete[-1] if complete else None
    if found is not None:
        if "origin" in layout.read_state(found):
            raise UserError(
                f"{found}: a converted checkpoint, which no training can resume; use init_from={found}"
            )
        saved = layout.read_config(found).model
        check_same_model(str(found), saved, run.model, "choose another run_dir")
        _check_adapted(found, run)
        theirs = saved.precision
        if theirs != run.model.precision:
            raise UserError(
                f"{found}: was trained with model.precision={theirs}, the configuration says "
                f"{run.model.precision}, for which its optimizer state does not fit; set "
                f"model.precision={theirs}, or start from the weights: init_from={found} and a new run_dir"
            )
    return found


def _check_adapted(checkpoint: Path, run: Run) -> None:
    """Adapters cannot go on as a whole model, nor a whole model as adapters."""
    if (adapted := needs_base(checkpoint)) == (run.lora.rank is not None):
        return
    theirs = "adapters" if adapted else "a whole model"
    raise UserError(
        f"{checkpoint}: holds {theirs}, the configuration says lora.rank={run.lora.rank or 'null'}; choose "
        "another run_dir, or set lora.rank as it was"
    )


def find_init(run: Run) -> Path | None:
    """The checkpoint that `init_from` means, in any format.

    Raises:
        UserError: There is none, or it is of another model.
    """
    if run.init_from is None:
        return None
    path = Path(run.init_from)
    if path.exists() and detect(path) != "esm2mega":
        return path
    found = pinned(layout.resolve_checkpoint(path))
    check_same_model(str(found), layout.read_config(found).model, run.model, "give another init_from")
    return found


def _refuse_later(run: Run, found: Path, complete: Sequence[Path]) -> None:
    """A run that goes on before checkpoints of its own run_dir would mix with them, and retention with it."""
    own = layout.step_dir(run.run_dir, layout.read_state(found)["step"])
    later = [path.name for path in complete if path.name >= own.name and not path.samefile(found)]
    if later:
        raise UserError(
            f"checkpoint.resume={run.checkpoint.resume}: {run.run_dir} holds {', '.join(later)}, which would "
            "be taken for checkpoints of this run; move them away, or choose another run_dir"
        )


def _resume(checkpoint: Path, state: TrainState, stream: TrainStream) -> LoopState:
    load_training_state(checkpoint, state.model, state.optimizer, trained_only=needs_base(checkpoint))
    saved = layout.read_state(checkpoint)
    stream.load_state_dict(saved["data"])
    state.schedule.load_state_dict(saved["schedule"])
    return LoopState(**saved["loop"])


def _saved_state(
    loop: LoopState, state: TrainState, stream: TrainStream, counts: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """``train_state.json``: no generator states, since data, masks and weights are pure functions of seed and
    position.
    """
    return {
        "step": loop.step,
        "valid_loss": loop.valid_loss,
        "loop": loop.to_dict(),
        "data": stream.state_dict(),
        "schedule": state.schedule.state_dict(),
        "token_counts": counts.tolist(),
    }


def _open_log(path: Path, resume_from: Path | None, step: int) -> tuple[JsonlLog, list[str]]:
    """The log, open behind `step`, and what became of records that were there."""
    old = JsonlLog.set_aside(path) if resume_from is None else None
    log = JsonlLog(path)
    if old is not None:
        return log, [f"log      that of an earlier start is now {old}"]
    dropped = log.truncate_after(step)
    behind = f"log      {dropped} record{'s' * (dropped > 1)} behind step {step} dropped from {path}"
    return log, [behind] if dropped else []


def _stages(config: Any) -> str:
    """Layers of each pipeline stage, as in 17+16."""
    layout = config.pipeline_model_parallel_layout
    ranks = range(layout.pipeline_model_parallel_size)
    return "+".join(str(layout.get_num_layers_to_build(vp_stage=0, pp_rank=rank)) for rank in ranks)


def _announcement(run: Run, ranks: Ranks, stream: TrainStream, model: list[Any]) -> list[str]:
    """What is about to run."""
    config = unwrap_model(model)[0].config
    return [
        f"model    {run.model.size or 'own shape'}: {shape_of(run.model)}; {run.model.precision}, "
        f"attention {config.packed_attention}",
        f"layout   {ranks.world_size} x {ranks.device.type}: "
        f"TP {ranks.tp_size}, PP {ranks.pp_size}, DP {ranks.dp_size}"
        + (", SP" if run.parallel.sequence_parallel else "")
        + (f"; stages of {_stages(config)} layers" if config.pipeline_model_parallel_layout else ""),
        f"batch    {run.train.global_batch_tokens} tokens a step in packs of {run.train.micro_batch_tokens}",
        *(f"data     {line}" for line in stream.samples.describe()),
    ]


def _start(run: Run, resume_from: Path | None, init_from: Path | None) -> list[str]:
    """Where the run goes and what it starts from."""
    if init_from is not None:
        return [f"run      {run.run_dir}, weights from {init_from}"]
    if resume_from is None:
        return [f"run      {run.run_dir}"]
    step = layout.read_state(resume_from)["step"]
    lines = [f"run      {run.run_dir}, resumed from {resume_from.name} at step {step}"]
    if run.init_from is not None:
        lines[0] += f"; init_from={run.init_from} is not used"
    before, now = flatten(layout.read_config(resume_from)), flatten(run)
    changed = [
        f"{key} {before[key]} -> {now[key]}"
        for key in now
        if before[key] != now[key] and key not in ("run_dir", "checkpoint.resume")
    ]
    if changed:
        lines.append(f"changed since the checkpoint: {', '.join(changed)}")
    return lines


def _ending(run: Run, begun: LoopState, loop: LoopState, checkpoint: Path | None) -> str:
    """How the run came to its end, in one line."""
    if out_of_patience(loop, run.train):
        text = (
            f"stopped early: no improvement in {loop.evaluations_without_improvement} evaluations, best "
            f"{loop.best_valid_loss:.4f} at step {loop.best_step}"
        )
        text += "" if loop.step == begun.step else f"; checkpoint {checkpoint}"
    elif loop == begun:
        text = f"nothing to do: step {loop.step} of {run.train.max_steps} is done"
    else:
        text = f"done: step {loop.step}, checkpoint {checkpoint}"
    return text
