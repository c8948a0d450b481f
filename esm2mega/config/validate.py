"""Checks a configuration as a whole, and against the number of processes, before anything starts.

It is pure Python: the command line runs these checks before it imports torch. Each error is one line with the
value, the rule, the key and the cure.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
from pathlib import Path

from esm2mega.config.batches import check_batches, check_shares
from esm2mega.config.best_metric import check_best_metric, downstream_names
from esm2mega.config.hub import how_to_fetch
from esm2mega.config.lora import check_lora, check_start
from esm2mega.config.model import check_context, check_layers, check_model
from esm2mega.config.presets import shape_of
from esm2mega.config.run_name import FORMS, is_there, split_run
from esm2mega.config.schema import (
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    Run,
    ScheduleConfig,
    TrainConfig,
    choices,
    flatten,
)
from esm2mega.config.split import check_split, has_valid
from esm2mega.config.task import DATA_DIR_LIST
from esm2mega.errors import UserError
from esm2mega.files import real_path, refuse_stream, split_sheet

_AT_LEAST = {
    "seed": 0,
    "model.num_layers": 1,
    "model.hidden_size": 1,
    "model.ffn_hidden_size": 1,
    "model.num_attention_heads": 1,
    "model.hidden_dropout": 0,
    "model.attention_dropout": 0,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.virtual_pipeline_model_parallel_size": 1,
    "parallel.context_parallel_size": 1,
    "data.max_seq_length": 3,  # <cls>, one residue, <eos>
    "data.split_seed": 0,
    "data.limit": 1,
    "data.pack_window": 1,
    "data.workers": 0,
    # Before the token counts, which may be derived from them.
    "train.micro_batch_size": 1,
    "train.global_batch_size": 1,
    "train.accumulate_grad_batches": 1,
    "train.micro_batch_tokens": 1,
    "train.global_batch_tokens": 1,
    "train.max_steps": 1,
    "train.max_epochs": 1,
    "train.eval_every": 0,
    "train.eval_batches": 0,
    "train.log_every": 1,
    "train.early_stopping.patience": 0,
    "train.early_stopping.min_delta": 0,
    "optim.weight_decay": 0,
    "optim.clip_grad": 0,
    "optim.initial_loss_scale": 1,
    "schedule.warmup_steps": 0,
    "schedule.decay_steps": 1,
    "schedule.min_lr_ratio": 0,
    "checkpoint.save_every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
    "data.mask_fraction": 0,
    "data.random_fraction": 0,
    "eval.mask_fraction": 0,
    "eval.random_fraction": 0,
    "eval.seed": 0,
    "lora.rank": 1,
    "lora.dropout": 0,
    "task.num_classes": 2,
    "task.hidden_size": 1,
    "task.dropout": 0,
    "task.label_smoothing": 0,
    "task.bootstrap": 0,
    "downstream.every": 1,
    "downstream.max_train": 2,
    "downstream.max_test": 2,
    "downstream.max_residues": 2,
    "infer.max_seq_length": 3,
    "infer.overlap": 0,
    "infer.micro_batch_tokens": 1,
}
_AT_MOST = {
    # Seeds go to numpy and torch generators; both take 63 bits.
    "seed": 2**63 - 1,
    "data.mask_fraction": 1,
    "data.random_fraction": 1,
    "eval.mask_fraction": 1,
    "eval.random_fraction": 1,
    "eval.seed": 2**63 - 1,
    "data.split_seed": 2**63 - 1,
    "schedule.min_lr_ratio": 1,
    "model.hidden_dropout": 0.99,
    "model.attention_dropout": 0.99,
    "task.dropout": 0.99,
    "lora.dropout": 0.99,
    "task.label_smoothing": 0.99,
}
_GREATER_THAN_ZERO = (
    "parallel.timeout_minutes",
    "train.max_minutes",
    "model.layernorm_epsilon",
    "model.init_std",
    "optim.lr",
    "optim.eps",
    "task.huber_delta",
    "downstream.memory_gb",
)


def validate(run: Run, world_size: int) -> None:
    """Refuse a configuration that cannot run, or would run as something else than it says.

    Args:
        run: Resolved configuration (see `esm2mega.config.load.resolve`).
        world_size: Number of processes of the run, over all machines.

    Raises:
        UserError: A rule does not hold; it is the first one that does not.
    """
    validate_model(run)
    _check_masking("data", run.data)
    _check_masking("eval", run.eval)
    check_split(run.data, is_labelled=run.task.kind is not None)
    _check_stores(run.data, run.train, is_labelled=run.task.kind is not None)
    _check_schedule(run.schedule, run.train)
    check_shares(run.train, run.parallel)
    check_batches(run.train, run.data, run.parallel, world_size)


def validate_model(run: Run) -> None:
    """Check the rules for every use of a model: single values, shape, numerics, layout, adapters."""
    check_choices(run)
    check_ranges(run)
    check_model(run.model, run.data.max_seq_length)
    check_layers(run.model, run.parallel, run.lora, run.train.micro_batch_tokens)
    _check_layout(run.model, run.parallel)
    check_lora(run.lora, run.model, has_lm_head=run.task.kind is None)


def check_choices(run: Run) -> None:
    """Check that every key with a closed set of values has one of them."""
    values = flatten(run)
    for key, valid in choices(run).items():
        value = values[key]
        # The schema's types allow null only where it has a meaning (no preset size).
        if value is None or value in valid:
            continue
        by_lower = {v.lower(): v for v in valid}
        near = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.4)
        hint = f"; did you mean {by_lower[near[0]]}?" if near else ""
        raise UserError(f"{key}={value} is not one of {', '.join(valid)}{hint}")


def check_training_inputs(run: Run) -> None:
    """Check what only training needs: inputs that are named and exist, and data to evaluate on."""
    labelled = run.task.kind is not None
    if run.data.train is None and labelled:
        raise UserError(
            "data.train is not set: give a table with sequences and labels, as data.train=FILE.csv"
        )
    if run.data.train is None:
        raise UserError(
            "data.train is not set: give a token store, e.g. data.train=DIR/train made by "
            "`esm2mega prepare fasta INPUT --out DIR`, or a file of sequences"
        )
    named = [("data.train", path) for path in run.data.train_paths()]
    held_out = (("data.valid", run.data.valid), ("data.test", run.data.test))
    named += [(key, path) for key, path in held_out if path is not None]
    for key, path in named:
        refuse_stream(path, f"{key}={path}")
        file = split_sheet(path)[0]
        if labelled and not (file.is_file() or os.path.isfile(os.path.join(path, DATA_DIR_LIST))):
            raise UserError(f"{key}={path}: no such file; give a table with sequences and labels")
        if not file.exists():
            raise UserError(
                f"{key}={path} is neither a token store nor a file of sequences; make a store with "
                "`esm2mega prepare fasta`"
            )
    _check_outputs(run.run_dir, run.logging)
    if run.train.eval_every and not has_valid(run.data):
        raise UserError(
            f"train.eval_every={run.train.eval_every} needs data.valid; "
            "give a validation token store, or set train.eval_every=0"
        )
    _check_downstream(run)
    check_best_metric(run.checkpoint, run.task, has_valid(run.data), run.downstream)
    check_start(run.lora, run.init_from)
    if run.init_from is not None and not is_there(run.init_from):
        cure = how_to_fetch(run.init_from) or f"give a checkpoint, a run, {FORMS}, or init_from=null"
        raise UserError(f"init_from={run.init_from} does not exist; {cure}")
    resume = run.checkpoint.resume
    if resume not in ("auto", "never") and not os.path.isdir(split_run(resume)[0]):
        raise UserError(
            f"checkpoint.resume={resume} is neither auto, never nor an existing checkpoint directory; "
            f"give one of the three, or {FORMS}"
        )


def _check_downstream(run: Run) -> None:
    """Check the folders of tasks that a pretraining is measured on."""
    tasks = run.downstream.tasks
    if not tasks:
        return
    if run.task.kind is not None:
        raise UserError(
            f"downstream.tasks={tasks} measures a pretraining, and task.kind={run.task.kind} is a "
            "fine-tuning; set downstream.tasks=[]"
        )
    if not run.train.eval_every:
        raise UserError(
            f"downstream.tasks={tasks} are measured after evaluations, but train.eval_every=0 never "
            "evaluates; set train.eval_every"
        )
    names = downstream_names(run.downstream)
    for number, (folder, name) in enumerate(zip(tasks, names, strict=True)):
        if not os.path.isdir(folder):
            raise UserError(
                f"downstream.tasks={folder}: no such folder; give one with train.csv and valid.csv, as "
                "`esm2mega prepare flip` makes it"
            )
        if not name or name in names[:number]:
            what = "has no name of its own" if not name else "has the name of another one"
            raise UserError(f"downstream.tasks={folder}: {what}, by which its results go; rename the folder")


def _check_outputs(run_dir: str, logging: LoggingConfig) -> None:
    """Check, as far as can be seen before the start, that the run's directory and logs can be written."""
    path = Path(run_dir)
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    if not there.is_dir():
        what = "is a file" if there == path else f"lies below {there}, which is a file"
        raise UserError(f"run_dir={run_dir} {what}; choose another run_dir")
    for package in ("tensorboard", "wandb"):
        if getattr(logging, package) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"logging.{package}=true, but the package {package} is not installed; "
                f"pip install 'esm2mega[logging]' or set logging.{package}=false"
            )


def check_ranges(run: Run) -> None:
    """Check single values, each on its own."""
    values = flatten(run)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is not a finite number; give one")
    for key, low in _AT_LEAST.items():
        if values[key] is not None and values[key] < low:
            raise UserError(f"{key}={values[key]} is too small; it must be at least {low}")
    for key, high in _AT_MOST.items():
        if values[key] > high:
            raise UserError(f"{key}={values[key]} is too large; it must be at most {high}")
    for key in _GREATER_THAN_ZERO:
        if values[key] is not None and values[key] <= 0:
            raise UserError(f"{key}={values[key]} must be greater than 0")
    for key in ("data.mlm_probability", "eval.mlm_probability"):
        if not 0 < values[key] < 1:
            raise UserError(f"{key}={values[key]} must be above 0 and below 1; ESM-2 uses 0.15")
    if len(run.optim.betas) != 2 or not all(math.isfinite(b) and 0 <= b < 1 for b in run.optim.betas):
        raise UserError(
            f"optim.betas={run.optim.betas} must be two numbers in [0, 1); ESM-2 uses [0.9, 0.98]"
        )
    if not run.run_dir:
        raise UserError("run_dir is empty; give the directory that the run is written to")


def _check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check the model's dimensions against TP, PP, VPP and SP."""
    shape = shape_of(model)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    for name, value in (
        ("num_attention_heads", shape.num_attention_heads),
        ("ffn_hidden_size", shape.ffn_hidden_size),
    ):
        if value % tp:
            raise UserError(
                f"model.{name}={value} is not divisible by parallel.tensor_model_parallel_size={tp}; "
                f"choose one of {_layout_list(shape.num_attention_heads, shape.ffn_hidden_size)}"
            )
    if shape.num_layers < pp:
        raise UserError(
            f"model.num_layers={shape.num_layers} is smaller than "
            f"parallel.pipeline_model_parallel_size={pp}, but every stage needs a layer; "
            f"set parallel.pipeline_model_parallel_size={shape.num_layers} or less"
        )
    if vpp is not None:
        if pp == 1:
            raise UserError(
                f"parallel.virtual_pipeline_model_parallel_size={vpp} needs "
                "parallel.pipeline_model_parallel_size > 1; set it to null"
            )
        if shape.num_layers % (pp * vpp):
            raise UserError(
                f"model.num_layers={shape.num_layers} is not divisible by "
                f"parallel.pipeline_model_parallel_size={pp} x "
                f"parallel.virtual_pipeline_model_parallel_size={vpp} = {pp * vpp}; "
                f"{_virtual_cure(shape.num_layers, pp)}"
            )
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; "
            "set parallel.sequence_parallel=false"
        )
    check_context(model, parallel)


def _virtual_cure(num_layers: int, pp: int) -> str:
    if num_layers % pp:
        return "set parallel.virtual_pipeline_model_parallel_size=null, which allows stages of unequal length"
    return f"for this pipeline size choose one of {_layout_list(num_layers // pp)}"


def _layout_list(*dimensions: int) -> str:
    """Return the parallel sizes up to 64 that divide every dimension."""
    return ", ".join(str(n) for n in range(1, 65) if all(d % n == 0 for d in dimensions))


def _check_masking(name: str, section: DataConfig | EvalConfig) -> None:
    """Check the fractions of selected residues that are masked and replaced, of the section `name`."""
    masked, random = section.mask_fraction, section.random_fraction
    if masked + random > 1 + 1e-9:  # the sum of two decimals may be off by rounding
        raise UserError(
            f"{name}.mask_fraction={masked} + {name}.random_fraction={random} is more than 1; what they "
            "leave of 1 is the fraction kept unchanged (ESM-2: 0.8 and 0.1)"
        )


def _check_stores(data: DataConfig, train: TrainConfig, is_labelled: bool) -> None:
    """Check that other splits are not training data, and the weights of a mixture of stores.

    One file of labelled proteins may hold several splits; their proteins are compared when they are read.
    """
    paths = data.train_paths()
    real = [real_path(path) for path in paths]
    for split in ("valid", "test"):
        path = getattr(data, split)
        if path is None or is_labelled or data.allow_overlap:
            continue
        if real_path(path) in real:
            raise UserError(
                f"data.{split}={path} is also data.train; its loss would not measure unseen proteins: "
                "give another store, as `esm2mega prepare fasta --val-size N --test-size N` makes it, or set "
                "data.allow_overlap=true"
            )
    for i, path in enumerate(paths):
        if real[i] in real[:i]:
            raise UserError(f"data.train names {path} twice; name it once and raise its data.weights instead")
    weights = data.weights
    if weights is not None and (len(weights) != len(paths) or len(paths) < 2):
        raise UserError(
            f"data.weights={weights} has {len(weights)} numbers, data.train names {len(paths)}; "
            "give one weight for each of two stores or more, or data.weights=null"
        )
    if weights is not None and not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"data.weights={weights} must be numbers greater than 0; leave a store out instead")
    if train.max_epochs is not None and len(paths) > 1:
        raise UserError(
            f"train.max_epochs={train.max_epochs} counts passes over one store, but data.train names "
            f"{len(paths)}; set train.max_steps, and train.max_epochs=null"
        )


def _check_schedule(schedule: ScheduleConfig, train: TrainConfig) -> None:
    """Check that warmup ends before the decay does, and that early stopping can happen at all."""
    if schedule.decay_steps is None and train.max_epochs is None:
        raise UserError("schedule.decay_steps is not set; load the configuration with esm2mega.config.load")
    # A run given in epochs is checked again when the data say how many steps these are.
    if schedule.decay_steps is not None and schedule.warmup_steps >= schedule.decay_steps:
        raise UserError(
            f"schedule.warmup_steps={schedule.warmup_steps} is not smaller than schedule.decay_steps="
            f"{schedule.decay_steps} (by default 90 % of train.max_steps={train.max_steps}, for cosine and "
            "constant all of it); lower the warmup or train longer"
        )
    if train.early_stopping.patience and not train.eval_every:
        raise UserError(
            f"train.early_stopping.patience={train.early_stopping.patience} counts evaluations, but "
            "train.eval_every=0 never evaluates; set train.eval_every"
        )
