"""Where a training starts: the checkpoint it resumes, or the weights it begins with."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from esm2mega.checkpoint import layout
from esm2mega.config.schema import Run
from esm2mega.convert.formats.registry import detect
from esm2mega.convert.into_model import check_same_model, head_at
from esm2mega.errors import UserError
from esm2mega.lora.base import needs_base
from esm2mega.lora.checkpoint import pinned


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
        earlier = layout.read_config(found)
        if earlier.task.kind != run.task.kind:
            raise UserError(
                f"{found}: is of a run with task.kind={earlier.task.kind}, the configuration says "
                f"{run.task.kind}; choose another run_dir, and start from its weights with init_from={found}"
            )
        for key in ("freeze", "lr_scale", "layer_decay"):
            theirs_value, own = getattr(earlier.finetune, key), getattr(run.finetune, key)
            if run.task.kind is not None and theirs_value != own:
                raise UserError(
                    f"{found}: was trained with finetune.{key}={theirs_value}, the configuration says {own}, "
                    "for which its optimizer state does not fit; set it back, or choose another run_dir and "
                    f"init_from={found}"
                )
        saved = earlier.model
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
    if (has_lora := needs_base(checkpoint)) == (run.lora.rank is not None):
        return
    theirs = "adapters" if has_lora else "a whole model"
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
    if run.task.kind is None and path.exists() and (head := head_at(path)) != "lm":
        what = "no head" if head is None else f"the head of task.kind={head.task.kind}"
        raise UserError(
            f"init_from={path}: has {what} in the place of that of masked language modelling, which "
            "pretraining goes on with; fine-tune it, or give another init_from"
        )
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
