"""Pretraining: build the objects of a run, resume or start, and hand them to the loop. No arithmetic."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.utils import unwrap_model

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.store import load_training_state, load_weights, save_checkpoint
from esm2mega.config.load import fix_length, save_resolved
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run
from esm2mega.config.validate import validate, world_size_from_environment
from esm2mega.data.batch import BatchSpec, token_counts
from esm2mega.data.loader import EvalPacks, TrainStream
from esm2mega.data.store import TokenStore
from esm2mega.errors import UserError
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.report.external import open_trackers
from esm2mega.report.log import JsonlLog
from esm2mega.report.progress import Progress
from esm2mega.train.evaluate import evaluate, evaluation_record, unigram_log_probabilities
from esm2mega.train.loop import Hooks, LoopState, fit
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from esm2mega.train.step import StepResult, TrainState


def pretrain(run: Run) -> LoopState:
    """Train as configured; every process of the world calls this with the same, validated configuration.

    Returns:
        The final state of the loop, the same on every rank.

    Raises:
        UserError: Missing or unfit input.
        MachineError: Loss not finite, or a checkpoint could not be written.
        StoppedBySignal: A signal came and the state was saved.
    """
    if run.data.train is None:
        raise UserError("data.train is not set: give the token store to train on, as data.train=DIR")
    train_stores = [TokenStore(path) for path in run.data.train_paths()]
    valid_store = TokenStore(run.data.valid) if run.data.valid is not None else None
    run = _with_steps(run, train_stores)
    resume_from = find_resume(run)
    with process_groups(run.parallel, run.seed) as ranks:
        return _train(run, ranks, train_stores, valid_store, resume_from)


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
    valid_store: TokenStore | None,
    resume_from: Path | None,
) -> LoopState:
    chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
    if run.init_from is not None and resume_from is None:
        load_weights(layout.resolve_checkpoint(run.init_from), chunks)
    model = wrap_data_parallel(chunks, run.model, run.parallel)
    optimizer = build_optimizer(run.optim, run, model)
    state = TrainState(
        model, optimizer, build_schedule(run.schedule, run.optim, optimizer), MLMLossReduction(), ranks.device
    )
    spec = _batch_spec(run)
    loop = LoopState()
    with ExitStack() as stack:
        stream = stack.enter_context(TrainStream(train_stores, spec, ranks.dp_rank, ranks.dp_size))
        counts = token_counts(stream.samples)
        log = stack.enter_context(JsonlLog(Path(run.run_dir) / "log.jsonl")) if ranks.speaks else None
        if resume_from is not None:
            loop = _resume(resume_from, state, stream)
        if log is not None:
            log.truncate_after(loop.step)
            save_resolved(run, Path(run.run_dir) / "config.yaml")
            _announce(run, ranks, stream, model, resume_from, loop)
        trackers = open_trackers(run.logging, run.run_dir, asdict(run), loop.step) if ranks.speaks else []
        for tracker in trackers:
            stack.callback(tracker.close)
        progress = stack.enter_context(
            Progress(run.train.max_steps, "pretrain", "step", enabled=ranks.speaks, initial=loop.step)
        )

        def write(record: dict[str, Any]) -> None:
            if log is not None:
                log.write(record)
            for tracker in trackers:
                tracker.write(record)
            if record["kind"] == "eval":
                progress.message(
                    f"step {record['step']}: validation loss {record['valid_loss']:.4f}, perplexity "
                    f"{record['valid_perplexity']:.2f} (residue frequencies: {record['unigram_loss']:.4f})"
                )

        def show(result: StepResult) -> None:
            progress.update(1, loss=f"{result.metrics['loss']:.4f}", lr=f"{result.lr:.2e}")

        def validate_now() -> dict[str, float]:
            assert valid_store is not None
            packs = EvalPacks(valid_store, spec, run.train.eval_batches, ranks.dp_rank, ranks.dp_size)
            unigram = unigram_log_probabilities(counts, ranks.device)
            return evaluation_record(evaluate(model, MLMLossReduction(unigram), packs, ranks))

        def save(loop: LoopState) -> None:
            directory = layout.step_dir(run.run_dir, loop.step)
            save_checkpoint(directory, model, optimizer, run, _saved_state(loop, state, stream, counts))
            if ranks.speaks:
                layout.prune(run.run_dir, run.checkpoint.keep_last, run.checkpoint.keep_best)

        fit(run, state, stream, loop, Hooks(write, show, validate_now if valid_store else None, save), ranks)
    return loop


def find_resume(run: Run) -> Path | None:
    """The checkpoint that `checkpoint.resume` means, or None for a fresh start.

    Raises:
        UserError: A fresh start was asked for in a directory that holds a run, or the named checkpoint is not
            there, or it is of another model.
    """
    if run.checkpoint.resume not in ("auto", "never"):
        found: Path | None = layout.resolve_checkpoint(run.checkpoint.resume)
    else:
        complete, incomplete = layout.find_checkpoints(run.run_dir)
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
        saved = layout.read_config(found)
        if (theirs := shape_of(saved.model)) != (ours := shape_of(run.model)):
            raise UserError(
                f"{found}: holds a model of {theirs}, the configuration says {ours}; choose another run_dir"
            )
    return found


def _resume(checkpoint: Path, state: TrainState, stream: TrainStream) -> LoopState:
    load_training_state(checkpoint, state.model, state.optimizer)
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


def _announce(
    run: Run, ranks: Ranks, stream: TrainStream, model: list[Any], resume_from: Path | None, loop: LoopState
) -> None:
    """Say once what is about to run."""
    config = unwrap_model(model)[0].config
    shape = shape_of(run.model)
    lines = [
        f"model    {run.model.size or 'own shape'}: {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads, FFN {shape.ffn_hidden_size}; {run.model.precision}, "
        f"attention {config.packed_attention}",
        f"layout   {ranks.world_size} x {ranks.device.type}: "
        f"TP {ranks.tp_size}, PP {ranks.pp_size}, DP {ranks.dp_size}"
        + (", SP" if run.parallel.sequence_parallel else ""),
        f"batch    {run.train.global_batch_tokens} tokens a step in packs of {run.train.micro_batch_tokens}",
        *(f"data     {line}" for line in stream.samples.describe()),
        f"run      {run.run_dir}"
        + (f", resumed from {resume_from.name} at step {loop.step}" if resume_from else ""),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
