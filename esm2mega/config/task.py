"""Checks the rules between the keys of fine-tuning.

It is pure Python, like `esm2mega.config.validate`.
"""

from __future__ import annotations

import math

from esm2mega.config.schema import FinetuneConfig, LoRAConfig, ParallelConfig, Run, TaskConfig
from esm2mega.errors import UserError

DATA_DIR_LIST = "meta.dat"
"""Lists the files of a data directory of Cerebras Model Zoo, which may take the place of a table."""

RESIDUE_KINDS = ("token_classification", "token_regression")
"""Lists the tasks with a label per residue."""

PAIR_KIND = "contact"
"""Names the task with a label per pair of residues, computed from coordinates of each residue."""

NUMERIC_KINDS = ("regression", "token_regression")
"""Lists the tasks whose labels are numbers, which are scaled as the training set says."""

_HEADS = {
    "proteins": ("auto", "mlp", "linear", "pooler", "hf", "tape", "proteinlm"),
    "residues": ("auto", "linear", "hf", "cnn", "tape", "proteinlm"),
    "pairs of residues": ("auto", "product", "attention_maps", "tape", "proteinlm"),
}


def validate_task(run: Run) -> None:
    """Refuse a task that cannot be learned as configured.

    Raises:
        UserError: A rule does not hold; it is the first one that does not.
    """
    task, data = run.task, run.data
    if task.kind is None:
        raise UserError("task.kind is not set: say what to learn, e.g. task.kind=regression")
    per_residue = task.kind in (*RESIDUE_KINDS, PAIR_KIND)
    what = "residues" if task.kind in RESIDUE_KINDS else "proteins"
    what = "pairs of residues" if task.kind == PAIR_KIND else what
    if task.head not in _HEADS[what]:
        raise UserError(
            f"task.head={task.head} does not go with task.kind={task.kind}; heads for {what} are "
            f"{', '.join(_HEADS[what])}"
        )
    if task.head == "attention_maps" and run.model.recompute != "none":
        raise UserError(
            f"model.recompute={run.model.recompute}: task.head=attention_maps computes its maps again "
            "itself; set model.recompute=none"
        )
    if not task.target_columns or len(set(task.target_columns)) < len(task.target_columns):
        raise UserError(
            f"task.target_columns={task.target_columns} must name one column or several once each"
        )
    if len(task.target_columns) > 1 and task.kind in ("classification", PAIR_KIND):
        raise UserError(
            f"task.target_columns={task.target_columns}: task.kind={task.kind} has one column; name one"
        )
    _check_masks(task)
    _check_classes(task)
    for key, kinds in (
        ("num_classes", ("classification", "token_classification", "multilabel")),
        ("label_smoothing", ("classification", "token_classification")),
    ):
        if getattr(task, key) and task.kind not in kinds:
            raise UserError(
                f"task.{key}={getattr(task, key)} does not go with task.kind={task.kind}; remove it"
            )
    if task.num_classes and task.kind == "token_classification" and len(task.target_columns) > 1:
        raise UserError(
            f"task.num_classes={task.num_classes} says nothing of several target columns, each of which has "
            "its own classes; remove it"
        )
    if task.class_weights != "none" and task.kind not in ("classification", "token_classification"):
        raise UserError(
            f"task.class_weights={task.class_weights} does not go with task.kind={task.kind}; remove it"
        )
    if task.loss != "mse" and task.kind not in NUMERIC_KINDS:
        raise UserError(f"task.loss={task.loss} applies to numbers, not to task.kind={task.kind}; remove it")
    uses_cls = task.head in ("pooler", "hf", "tape", "proteinlm") or task.pooling == "cls"
    if uses_cls and not per_residue and data.too_long == "crop" and data.crop != "start":
        raise UserError(
            f"data.crop={data.crop} may cut <cls> away, which the head reads; set data.crop=start"
        )
    if data.crop == "chunk" and data.too_long == "crop" and task.kind not in RESIDUE_KINDS:
        wrong = (
            "would lose the pairs between chunks" if per_residue else "would label every chunk as the protein"
        )
        raise UserError(f"data.crop=chunk {wrong}, task.kind={task.kind}; set data.crop=random or start")
    if data.workers:
        raise UserError(
            f"data.workers={data.workers}: labelled proteins are in memory and need none; set data.workers=0"
        )
    if len(data.train_paths()) > 1 or data.weights is not None:
        raise UserError("data.train names several tables; join them into one for fine-tuning")
    if run.finetune.mode == "frozen" and (run.model.hidden_dropout or run.model.attention_dropout):
        raise UserError(
            "finetune.mode=frozen computes the encoder once for each protein, without dropout; set "
            "model.hidden_dropout=0 and model.attention_dropout=0, or finetune.mode=full and finetune.freeze"
        )
    _check_finetune(run.finetune, run.task, run.lora, run.parallel, run.init_from is not None)


def masks_of(task: TaskConfig) -> list[str | None]:
    """Return the mask's column for each target column, or None where all residues count."""
    masks = task.mask_column
    return list(masks) if isinstance(masks, list) else [masks] * len(task.target_columns)


def classes_of_columns(task: TaskConfig) -> list[list[str] | None]:
    """Return the declared classes of each target column, or None where the training labels decide."""
    declared = task.classes
    if declared is None:
        return [None] * len(task.target_columns)
    return list(declared) if any(not isinstance(entry, str) for entry in declared) else [list(declared)]


def _check_masks(task: TaskConfig) -> None:
    """Check the columns that say which residues count."""
    masks, per_residue = task.mask_column, task.kind in (*RESIDUE_KINDS, PAIR_KIND)
    shown = f"task.mask_column={masks}"
    if masks is not None and not per_residue:
        raise UserError(
            f"{shown} marks residues, but task.kind={task.kind} has labels of proteins; set "
            "task.mask_column=null"
        )
    if not all(mask is None or (isinstance(mask, str) and mask) for mask in masks_of(task)):
        raise UserError(f"{shown} must be a column, a list of columns and nulls, or null")
    if isinstance(masks, list) and task.kind == PAIR_KIND:
        raise UserError(f"{shown}: task.kind={task.kind} has one mask; name its column, without a list")
    if len(masks_of(task)) != len(task.target_columns):
        raise UserError(
            f"{shown} has {len(masks_of(task))} entries for task.target_columns={task.target_columns}; give "
            "one for each, null for none, or one column for all"
        )
    if task.mask_file is not None and (not per_residue or masks is not None):
        cure = "set task.mask_column=null" if per_residue else "set task.mask_file=null"
        raise UserError(f"task.mask_file={task.mask_file} marks residues instead of task.mask_column; {cure}")


def _check_classes(task: TaskConfig) -> None:
    """Check the declared classes, which a cell must be able to hold."""
    if task.classes is None:
        return
    shown, columns = f"task.classes={task.classes}", task.target_columns
    if task.kind not in ("classification", "token_classification", "multilabel"):
        raise UserError(f"{shown} does not go with task.kind={task.kind}; remove it")
    if task.kind == "multilabel" and len(columns) > 1:
        raise UserError(f"{shown}: the classes are the columns task.target_columns={columns}; remove it")
    declared = classes_of_columns(task)
    if len(declared) != len(columns):
        raise UserError(
            f"{shown} must have a list of classes for each of task.target_columns={columns}, null for those "
            "of the training labels, as in [[C, E, H], null]"
        )
    fewest = 1 if task.kind == "multilabel" else 2
    for names in declared:
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{shown} must be a list of class names, or one such list for each column")
        if len(names) < fewest or len(set(names)) < len(names):
            raise UserError(f"{shown} must name {fewest} classes or more, each of them once")
        for name in names:
            # A blank may be the class of a residue, as in DSSP's strings; all others are read between blanks.
            if name != name.strip() and not (name == " " and task.kind == "token_classification"):
                raise UserError(
                    f"{shown}: {name!r} begins or ends with a blank, which labels never do; remove it"
                )
            if task.kind == "multilabel" and ";" in name:
                raise UserError(f"{shown}: {name!r} holds the ; that separates names in a cell; rename it")
    if task.num_classes is not None and declared[0] is not None and task.num_classes != len(declared[0]):
        raise UserError(
            f"{shown} are {len(declared[0])} classes, task.num_classes={task.num_classes}; remove "
            "task.num_classes"
        )


def _check_finetune(
    finetune: FinetuneConfig, task: TaskConfig, lora: LoRAConfig, parallel: ParallelConfig, has_start: bool
) -> None:
    """Check what is trained, and how fast."""
    rank = lora.rank
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
        and task.head != "attention_maps"
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
    if finetune.skip and (rank is not None or not has_start):
        reason = (
            "is of no use without init_from" if rank is None else "would leave adapters without their base"
        )
        raise UserError(f"finetune.skip={finetune.skip} {reason}; remove it")
    for pattern, factor in finetune.lr_scale.items():
        if not 0 < factor < math.inf:
            raise UserError(
                f"finetune.lr_scale={{{pattern}: {factor}}} must be greater than 0; finetune.freeze keeps "
                "weights as they are"
            )
    if not 0 < finetune.layer_decay <= 1:
        raise UserError(f"finetune.layer_decay={finetune.layer_decay} must be above 0 and at most 1")
