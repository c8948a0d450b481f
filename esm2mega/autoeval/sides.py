"""Opens the checkpoints of both sides, and refuses those that cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence

from esm2mega.autoeval.models import LanguageModel, Model, TaskModel
from esm2mega.convert.start_point import asks_to_verify, open_checkpoint
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.finetune.checkpoint import labelled, open_task
from esm2mega.finetune.user_code import GivenCode
from esm2mega.train.evaluate import open_evaluation


def open_models(
    sides: Sequence[Sequence[str]], data: str, overrides: Sequence[str], code: GivenCode
) -> list[list[Model]]:
    """Open all checkpoints of all sides, and check that they can be compared; all ranks call this together.

    Args:
        sides: Names of the checkpoints of each side, as for `esm2mega evaluate`.
        data: What `esm2mega evaluate` measures such a checkpoint on.
        overrides: ``key=value`` over the configuration of each of them.
        code: The user's own head and loss; each checkpoint gets what it was trained with.
    """
    models = [[_open(name, data, overrides, code) for name in names] for names in sides]
    every = [model for side in models for model in side]
    _check_code(every, code)
    for side in models:
        paths = [model.start.path for model in side]
        if repeated := next((path for path in paths if paths.count(path) > 1), None):
            raise UserError(
                f"{repeated}: is named twice on one side; name each run once, since their spread is the noise"
            )
    for model in every[1:]:
        _check_alike(every[0], model)
    return models


def _check_alike(first: Model, other: Model) -> None:
    """Refuse checkpoints that compute different things, or are measured otherwise or on other proteins."""
    names = f"{first.name} and {other.name}"
    if isinstance(first, TaskModel) and isinstance(other, TaskModel):
        mine, others = (
            (model.task.info.kind, sorted(model.task.info.output_names)) for model in (first, other)
        )
        if mine != others:
            raise UserError(
                f"{names} predict different things ({mine[0]} of {first_of(mine[1])}; {others[0]} of "
                f"{first_of(others[1])}); compare models of one task, or name the columns of --data by "
                "task.target_columns=[NAME], which holds for all"
            )
    elif type(first) is not type(other):
        task, language = (first, other) if isinstance(first, TaskModel) else (other, first)
        raise UserError(
            f"{task.name} has the head of a task, {language.name} is a language model; compare like with like"
        )
    if first.recipe != other.recipe:
        pairs = [(key, value, other.settings[key]) for key, value in first.settings.items()]
        differ = ", ".join(f"{key} {value} and {others}" for key, value, others in pairs if value != others)
        raise UserError(
            f"{names} are evaluated by different recipes (eval_recipe {first.recipe} and {other.recipe}: "
            f"{differ}); {first.cure}"
        )
    if first.fingerprint != other.fingerprint:
        raise UserError(
            f"{names} read different proteins or labels from --data; name its columns by "
            "data.sequence_column=NAME or task.mask_column=NAME, which hold for all"
        )


def _open(name: str, data: str, overrides: Sequence[str], code: GivenCode) -> Model:
    start = open_checkpoint(name, asks_to_verify(overrides))
    if start.task is None:
        return LanguageModel(name, open_evaluation(start, data, overrides))
    recorded = start.task.code
    if recorded is not None:
        code = GivenCode(
            None if recorded.head is None else code.make_head,
            None if recorded.loss is None else code.loss,
            None if recorded.model is None else code.model,
        )
    task = open_task(start, overrides, code, needs_loss=True)
    if not task.run.task.bootstrap:
        raise UserError(f"{name}: task.bootstrap=0 leaves no interval of metrics; give task.bootstrap=1000")
    return TaskModel(name, task, labelled(task, data))


def _check_code(models: Sequence[Model], code: GivenCode) -> None:
    """Refuse code that none of the checkpoints was trained with."""
    used = [model.task.code for model in models if isinstance(model, TaskModel)]
    for what, given, taken in (
        ("head", code.make_head, [found.make_head for found in used]),
        ("loss", code.loss, [found.loss for found in used]),
        ("model", code.model, [found.model for found in used]),
    ):
        if given is not None and given not in taken:
            raise UserError(f"--code: no checkpoint has a {what} of your own code; leave it out")
