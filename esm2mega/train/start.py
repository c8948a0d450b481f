"""Decides where a training starts: at a checkpoint that it resumes, or with weights given to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.fallback import ALL_OF_IT, Verification, set_aside
from esm2mega.checkpoint.run_lock import owning
from esm2mega.config.batches import formula, resolve_batches
from esm2mega.config.hub import how_to_fetch
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import load_run, load_run_over, values_of
from esm2mega.config.machine import on_this_machine
from esm2mega.config.paths import expand_user
from esm2mega.config.run_name import is_there, split_run
from esm2mega.config.schema import Run
from esm2mega.convert.formats.esm2mega import run_of
from esm2mega.convert.into_model import check_same_model
from esm2mega.convert.start_point import (
    StartPoint,
    asks_to_verify,
    open_together,
    read_checkpoint,
    read_start,
)
from esm2mega.errors import DamagedError, UserError
from esm2mega.files import first_of
from esm2mega.lora.base import has_adapters, with_base
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.paths import expand_paths


def load_run_with_start(config: str | None, overrides: Sequence[str] = ()) -> tuple[Run, StartPoint | None]:
    """Load a run with the model of `init_from` unless another is configured; all ranks call this together.

    Args:
        config: Path or name of a configuration; None for the defaults.
        overrides: ``key=value`` settings that replace those of the file.

    Returns:
        The configuration; and the checkpoint that `init_from` names, as rank 0 opened it, or None.

    Raises:
        UserError: `load_run` refuses the configuration, or `init_from` cannot be read.
    """
    init_from, *shape = values_of(("init_from", "model.size", "model.num_layers"), config, overrides)
    strict, rank = values_of(("finetune.strict", "lora.rank"), config, overrides)
    start = None
    if init_from is not None:
        verify = asks_to_verify(overrides, config)
        partial = strict is False and rank is None
        start = open_together(lambda how: _read_trainable(init_from, how, partial), verify)
    if start is None:
        if init_from is not None and shape == [None, None]:
            cure = how_to_fetch(init_from) or "correct it"
            raise UserError(f"init_from={init_from} does not exist, and no model is configured; {cure}")
        return expand_paths(load_run(config, overrides)), None
    model = on_this_machine(start.run).model
    return expand_paths(load_run_over(Run(model=model), overrides, config)), start


def _read_trainable(init_from: str, verification: Verification, partial: bool) -> StartPoint | None:
    """Open a checkpoint that can be trained; return None if there is nothing at this path."""
    path = expand_user("init_from", init_from)
    if not is_there(path):
        return None
    start = read_start(path, verification, partial)
    if not start.is_own:
        run_of(start.weights.description)  # refuses a dtype that no training computes in
    return start


def open_training_start(run: Run, opened: StartPoint | None = None) -> StartPoint | None:
    """Open what a training starts from, and the base of its adapters if any; all ranks call this together.

    Args:
        run: The configuration.
        opened: The checkpoint that `init_from` names, if it has been opened.

    Returns:
        A checkpoint to resume (`StartPoint.is_resumed`) or to take weights from, as rank 0 found it; None for
        new weights.

    Raises:
        UserError: `find_resume` or `find_init` refuses the start; or the base is missing or cannot be read.
    """

    def find(how: Verification) -> StartPoint | None:
        resumed = find_resume(run, how)
        if resumed is None:
            return find_init(run, opened, how)
        return with_base(resumed, run.init_from, opened, verification=how)

    found = open_together(find, run.checkpoint.verify, timedelta(minutes=run.parallel.timeout_minutes))
    if opened is not None and not any(x is opened for x in (found, found and found.base)):
        opened.release()
    return found


def with_batches(run: Run, start: StartPoint | None) -> Run:
    """Return a run whose steps take a known number of proteins, if its batches are counted in proteins.

    A run that is resumed keeps the number of its checkpoint, at any data-parallel size that divides it. All
    ranks call this together.

    Args:
        run: The configuration.
        start: What `open_training_start` returned.

    Raises:
        UserError: The number cannot be divided over the processes.
    """
    saved = start.run.train.global_batch_size if start is not None and start.is_resumed else None
    world_size = world_size_from_environment()
    train = resolve_batches(run.train, run.data, run.parallel, world_size, saved)
    if saved is not None and train.micro_batch_size is not None and run.train.global_batch_size is None:
        product = formula(run.train, run.parallel, world_size)
        if product != saved:
            line = (
                f"a step takes {saved} proteins as in the checkpoint, not train.micro_batch_size x "
                f"data-parallel size x train.accumulate_grad_batches = {product}"
            )
            on_one_rank(lambda: print(f"esm2mega: {line}", file=sys.stderr, flush=True))
    return replace(run, train=train)


def find_resume(run: Run, verification: Verification = ALL_OF_IT) -> StartPoint | None:
    """Return the checkpoint that `checkpoint.resume` means, or None for a fresh start.

    Where it means the newest one of `run_dir`, damaged ones are renamed, and the newest good one is returned.

    Args:
        run: The configuration.
        verification: How far a checkpoint is verified.

    Raises:
        UserError: A fresh start was asked for in a directory that holds a run; or the named checkpoint does
            not exist, run_dir holds later ones, or it belongs to another model; or all are damaged.
        DamagedError: The one that was named exactly is damaged.
    """
    complete, incomplete = layout.find_checkpoints(run.run_dir)
    found: StartPoint | None = None
    if run.checkpoint.resume not in ("auto", "never") and not (complete and _means_newest_of_its_own(run)):
        found = read_checkpoint(run.checkpoint.resume, resuming=True, verification=verification)
        _refuse_later(run, found, complete)
    else:
        if run.checkpoint.resume == "never" and complete:
            raise UserError(
                f"checkpoint.resume=never, but {run.run_dir} holds checkpoints up to {complete[-1].name}; "
                "choose another run_dir, one with {version} for a new number at every start, or "
                "checkpoint.resume=auto to continue"
            )
        for directory in incomplete:
            print(f"esm2mega: ignoring {directory}: it has no {layout.COMPLETE}", file=sys.stderr)
        found = _newest_good(run, complete, verification)
    if found is None:
        return None
    _check_resumable(found, run)
    return replace(found, is_resumed=True)


def _means_newest_of_its_own(run: Run) -> bool:
    """Tell whether `checkpoint.resume` names the run that `run_dir` is, and of it the last checkpoint."""
    text, which = split_run(run.checkpoint.resume)
    named = Path(text)
    folders = (Path(run.run_dir), layout.checkpoints_dir(run.run_dir))
    return (
        which in (None, "last") and named.exists() and any(named.samefile(f) for f in folders if f.exists())
    )


def _newest_good(run: Run, complete: Sequence[Path], verification: Verification) -> StartPoint | None:
    """Return the newest checkpoint of `run_dir` that is not damaged; those newer than it are set aside."""
    for directory in reversed(complete):
        try:
            return read_checkpoint(directory, verification=verification)
        except DamagedError as error:
            with owning(run.run_dir):
                # Else another start has set it aside, or its run has removed it.
                if layout.is_complete(directory):
                    set_aside(directory, error)
    if (damaged := layout.find_set_aside(run.run_dir)) and run.checkpoint.resume != "never":
        raise UserError(
            f"run_dir={run.run_dir}: all of its checkpoints are damaged, and renamed to "
            f"{first_of([path.name for path in damaged])}; copy a good one there and give it its name, or "
            "start anew in another run_dir, for instance with init_from=CHECKPOINT"
        )
    return None


def _check_resumable(found: StartPoint, run: Run) -> None:
    """Refuse a checkpoint that this configuration cannot continue as if the run had never stopped."""
    path, saved = found.path, found.run
    if "origin" in found.state:
        raise UserError(f"{path}: a converted checkpoint, which no training can resume; use init_from={path}")
    if saved.task.kind != run.task.kind:
        raise UserError(
            f"{path}: is of a run with task.kind={saved.task.kind}, the configuration says "
            f"{run.task.kind}; choose another run_dir, and start from its weights with init_from={path}"
        )
    for key in ("freeze", "lr_scale", "layer_decay"):
        theirs, own = getattr(saved.finetune, key), getattr(run.finetune, key)
        if run.task.kind is not None and theirs != own:
            raise UserError(
                f"{path}: was trained with finetune.{key}={theirs}, the configuration says {own}, "
                "for which its optimizer state does not fit; set it back, or choose another run_dir and "
                f"init_from={path}"
            )
    check_same_model(str(path), saved.model, run.model, "choose another run_dir")
    if has_adapters(found) != (run.lora.rank is not None):
        what = "adapters" if has_adapters(found) else "a whole model"
        raise UserError(
            f"{path}: holds {what}, the configuration says lora.rank={run.lora.rank or 'null'}; choose "
            "another run_dir, or set lora.rank as it was"
        )
    if (precision := saved.model.precision) != run.model.precision:
        raise UserError(
            f"{path}: was trained with model.precision={precision}, the configuration says "
            f"{run.model.precision}, for which its optimizer state does not fit; set "
            f"model.precision={precision}, or start from the weights: init_from={path} and a new run_dir"
        )


def _takes_a_part(run: Run) -> bool:
    """Tell whether a part of the model of `init_from` is enough.

    Adapters need all of it: they are kept without the weights under them, which are read again with them.
    """
    return run.task.kind is not None and not run.finetune.strict and run.lora.rank is None


def find_init(
    run: Run, opened: StartPoint | None = None, verification: Verification = ALL_OF_IT
) -> StartPoint | None:
    """Return the checkpoint that `init_from` means, in any format, or None if it is not set.

    Args:
        run: The configuration.
        opened: That checkpoint, if it has been opened.
        verification: How far the checkpoint is verified.

    Raises:
        UserError: The checkpoint does not exist, or it belongs to another model.
    """
    if run.init_from is None:
        return None
    partial = _takes_a_part(run)
    if opened is None or (opened.is_partial and not partial):
        found = read_start(run.init_from, verification, partial)
    else:
        found = opened
    if run.task.kind is None and found.head != "lm":
        what = "no head" if found.task is None else f"the head of task.kind={found.task.task.kind}"
        raise UserError(
            f"init_from={run.init_from}: has {what} instead of the masked-language-model head, which "
            "pretraining needs; fine-tune it, or give another init_from"
        )
    found.check_whole()
    location = str(found.path) if found.is_own else f"init_from={found.path}"
    check_same_model(location, found.run.model, run.model, "give another init_from")
    return found


def _refuse_later(run: Run, found: StartPoint, complete: Sequence[Path]) -> None:
    """Refuse to resume before later checkpoints of run_dir, since this run's would be mixed with them."""
    own = layout.step_dir(run.run_dir, found.state["step"])
    later = [path.name for path in complete if path.name >= own.name and not path.samefile(found.path)]
    if later:
        raise UserError(
            f"checkpoint.resume={run.checkpoint.resume}: {run.run_dir} holds {', '.join(later)}, which would "
            "be taken for checkpoints of this run; move them away, or choose another run_dir"
        )
