"""Checks that a head which a fine-tuning starts from keeps the meaning of its outputs."""

from __future__ import annotations

from esm2mega.config.head_form import head_form
from esm2mega.config.schema import FinetuneConfig, TaskConfig
from esm2mega.config.task import PAIR_KIND
from esm2mega.convert.heads.user_code import UserCode
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.start_point import StartPoint, starts_with_contact_head
from esm2mega.data.labels.schema import TargetInfo, with_columns
from esm2mega.errors import UserError
from esm2mega.finetune.user_code import GivenCode


def loaded_targets(
    task: TaskConfig, finetune: FinetuneConfig, start: StartPoint | None, code: GivenCode
) -> TargetInfo | None:
    """Return what the outputs mean of the head that `finetune.load_head` asks for.

    Args:
        task: The configured task.
        finetune: Says whether a head is to be loaded.
        start: The checkpoint that the run resumes or starts from.
        code: A user's own head and loss.

    Returns:
        Its classes in order, or its scale; None if a new head learns them from the training data.

    Raises:
        UserError: There is no head, or it is another one than configured.
    """
    if not finetune.load_head:
        return None
    if start is None:
        raise UserError("finetune.load_head=true: there is nothing to load it from; set init_from")
    if start.is_resumed:
        assert start.task is not None
        return with_columns(start.task.info, task, str(start.path))
    if starts_with_contact_head(start, task, finetune):
        return TargetInfo(PAIR_KIND, [PAIR_KIND])
    if start.task is None:
        raise UserError(f"init_from={start.path}: has no head of a task; set finetune.load_head=false")
    location = f"init_from={start.path}"
    recorded = start.task.code or UserCode()
    if recorded.loss_predicts or (recorded.head is not None and code.make_head is None):
        code.check(start.task, location)
    _check_same_head(location, start.task, task)
    return with_columns(start.task.info, task, f"init_from={start.path}")


def check_units(location: str, loaded: TargetInfo, info: TargetInfo) -> None:
    """Refuse a loaded head whose numbers have another scale than those that the loss of this run trains.

    Args:
        location: Where the head is, for messages.
        loaded: Meaning of its outputs.
        info: Meaning of the outputs in this run.
    """
    if (loaded.mean, loaded.std) != (info.mean, info.std):
        raise UserError(
            f"{location}: the outputs of its head are scaled by mean {loaded.mean} and standard deviation "
            f"{loaded.std}, the loss of this run takes mean {info.mean} and {info.std}; set "
            "finetune.load_head=false, or give a loss with that scale"
        )


def _check_same_head(location: str, head: HeadDescription, configured: TaskConfig) -> None:
    found = head.task
    cure = "or finetune.load_head=false"
    if found.kind != configured.kind:
        raise UserError(
            f"{location}: holds the head of task.kind={found.kind}, the configuration says "
            f"{configured.kind}; set task.kind={found.kind}, {cure}"
        )
    if head.is_configured and head_form(found) != head_form(configured):
        keys = ("head", "pooling", "pooler_activation")
        settings = " ".join(f"task.{key}={getattr(found, key)}" for key in keys)
        raise UserError(
            f"{location}: holds another head than the configuration names; set {settings}, {cure}"
        )
