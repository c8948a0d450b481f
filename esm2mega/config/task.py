"""Rules of fine-tuning between keys. Pure Python, as `validate`."""

from __future__ import annotations

import math

from esm2mega.config.schema import Run
from esm2mega.errors import UserError

RESIDUE_KINDS = ("token_classification", "token_regression")
"""Tasks with a label per residue."""

_NUMERIC_KINDS = ("regression", "token_regression")
_HEADS = {
    False: ("auto", "mlp", "linear", "pooler", "hf"),
    True: ("auto", "linear", "hf", "cnn"),
}


def validate_task(run: Run) -> None:
    """Refuse a task that cannot be learned as configured.

    Raises:
        UserError: the first rule that does not hold.
    """
    task, data = run.task, run.data
    if task.kind is None:
        raise UserError("task.kind is not set: say what to learn, e.g. task.kind=regression")
    per_residue = task.kind in RESIDUE_KINDS
    if task.head not in _HEADS[per_residue]:
        what = "residues" if per_residue else "proteins"
        raise UserError(
            f"task.head={task.head} does not go with task.kind={task.kind}; heads for {what} are "
            f"{', '.join(_HEADS[per_residue])}"
        )
    if not task.target_columns or len(set(task.target_columns)) < len(task.target_columns):
        raise UserError(
            f"task.target_columns={task.target_columns} must name one column or several once each"
        )
    if len(task.target_columns) > 1 and task.kind not in ("regression", "multilabel"):
        raise UserError(
            f"task.target_columns={task.target_columns}: task.kind={task.kind} has one column; name one"
        )
    if task.mask_column is not None and not per_residue:
        raise UserError(
            f"task.mask_column={task.mask_column} marks residues, but task.kind={task.kind} has labels of "
            "proteins; set task.mask_column=null"
        )
    for key, kinds in (
        ("num_classes", ("classification", "token_classification", "multilabel")),
        ("label_smoothing", ("classification", "token_classification")),
    ):
        if getattr(task, key) and task.kind not in kinds:
            raise UserError(
                f"task.{key}={getattr(task, key)} does not go with task.kind={task.kind}; remove it"
            )
    if task.class_weights != "none" and task.kind not in ("classification", "token_classification"):
        raise UserError(
            f"task.class_weights={task.class_weights} does not go with task.kind={task.kind}; remove it"
        )
    if task.loss != "mse" and task.kind not in _NUMERIC_KINDS:
        raise UserError(f"task.loss={task.loss} is of numbers, not of task.kind={task.kind}; remove it")
    uses_cls = task.head in ("pooler", "hf") or task.pooling == "cls"
    if uses_cls and not per_residue and data.too_long == "crop" and data.crop != "start":
        raise UserError(
            f"data.crop={data.crop} may cut <cls> away, which the head reads; set data.crop=start"
        )
    if data.crop == "chunk" and data.too_long == "crop" and not per_residue:
        raise UserError(
            f"data.crop=chunk would give every chunk the label of the protein, task.kind={task.kind}; "
            "set data.crop=random or start"
        )
    if data.workers:
        raise UserError(
            f"data.workers={data.workers}: labelled proteins are in memory and need none; set data.workers=0"
        )
    if len(data.train_paths()) > 1 or data.weights is not None:
        raise UserError("data.train names several tables; join them into one for fine-tuning")
    _check_finetune(run)


def _check_finetune(run: Run) -> None:
    """What is trained, and how fast."""
    finetune, parallel, rank = run.finetune, run.parallel, run.lora.rank
    if finetune.mode == "lora" and rank is None:
        raise UserError("finetune.mode=lora needs the rank of the adapters; set lora.rank, e.g. lora.rank=8")
    if finetune.mode != "lora" and rank is not None:
        what = {"full": "all weights in place of adapters", "frozen": "the head alone, without adapters"}
        raise UserError(
            f"lora.rank={rank} does not go with finetune.mode={finetune.mode}, which trains "
            f"{what[finetune.mode]}; set finetune.mode=lora or lora.rank=null"
        )
    if (
        finetune.mode == "frozen"
        and parallel.distributed_optimizer
        and parallel.pipeline_model_parallel_size > 1
    ):
        raise UserError(
            "parallel.distributed_optimizer=true needs weights to train in every pipeline stage, but "
            "finetune.mode=frozen trains the last one alone; set parallel.distributed_optimizer=false"
        )
    if finetune.mode != "full" and finetune.freeze:
        trained = {"frozen": "the head", "lora": "adapters and head"}[finetune.mode]
        raise UserError(
            f"finetune.freeze={finetune.freeze} is of no use with finetune.mode={finetune.mode}, which "
            f"freezes all but {trained}; remove it"
        )
    for pattern, factor in finetune.lr_scale.items():
        if not 0 < factor < math.inf:
            raise UserError(
                f"finetune.lr_scale={{{pattern}: {factor}}} must be greater than 0; finetune.freeze keeps "
                "weights as they are"
            )
    if not 0 < finetune.layer_decay <= 1:
        raise UserError(f"finetune.layer_decay={finetune.layer_decay} must be above 0 and at most 1")
