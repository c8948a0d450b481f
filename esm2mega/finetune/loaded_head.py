"""The head that a fine-tuning goes on with: what its outputs mean is decided where it was trained."""

from __future__ import annotations

from pathlib import Path

from esm2mega.checkpoint import layout
from esm2mega.config.head_form import head_form
from esm2mega.config.schema import Run, TaskConfig
from esm2mega.config.task import PAIR_KIND
from esm2mega.convert.into_model import head_at, starts_with_contact_head
from esm2mega.data.labels.schema import TargetInfo, with_columns
from esm2mega.errors import UserError


def loaded_targets(run: Run, init_from: Path | None, resume_from: Path | None) -> TargetInfo | None:
    """What the outputs of the head mean that `finetune.load_head` asks for: its classes in order, or its
    scale. None if a new head learns that from the training data.

    Args:
        run: The configuration.
        init_from: Checkpoint that a new run starts from.
        resume_from: Checkpoint of the run itself, which it goes on from.

    Raises:
        UserError: There is no head, or it is another one than configured.
    """
    if not run.finetune.load_head:
        return None
    if resume_from is not None:
        found = TargetInfo.from_dict(layout.read_state(resume_from)["task"])
        return with_columns(found, run.task, str(resume_from))
    if init_from is None:
        raise UserError("finetune.load_head=true: there is nothing to load it from; set init_from")
    if starts_with_contact_head(init_from, run):
        return TargetInfo(PAIR_KIND, [PAIR_KIND])
    head = head_at(init_from)
    if not head or head == "lm":
        raise UserError(f"init_from={init_from}: has no head of a task; set finetune.load_head=false")
    _check_same_head(f"init_from={init_from}", head.task, run.task)
    return with_columns(head.info, run.task, f"init_from={init_from}")


def _check_same_head(location: str, found: TaskConfig, configured: TaskConfig) -> None:
    cure = "or finetune.load_head=false"
    if found.kind != configured.kind:
        raise UserError(
            f"{location}: holds the head of task.kind={found.kind}, the configuration says "
            f"{configured.kind}; set task.kind={found.kind}, {cure}"
        )
    if head_form(found) != head_form(configured):
        keys = ("head", "pooling", "pooler_activation")
        settings = " ".join(f"task.{key}={getattr(found, key)}" for key in keys)
        raise UserError(
            f"{location}: holds another head than the configuration names; set {settings}, {cure}"
        )
