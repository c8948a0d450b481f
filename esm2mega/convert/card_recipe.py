"""Describes the settings of a training for its model card."""

from __future__ import annotations

from collections.abc import Iterator

from esm2mega.config.hub import shared_name
from esm2mega.config.schema import Run
from esm2mega.convert.history import History
from esm2mega.convert.markdown import plain


def recipe(history: History) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide what a training learns, as names and values."""
    run = history.run
    train, optim, schedule, data = run.train, run.optim, run.schedule, run.data
    yield "optimizer steps", f"{history.step:,} of {train.max_steps:,}"
    if train.global_batch_size is not None:
        yield "proteins per step", f"{train.global_batch_size:,}"
    elif train.micro_batch_size is None:
        yield "tokens per step", f"{train.global_batch_tokens:,}"
    yield "longest piece of a protein", f"{data.max_seq_length:,} tokens"
    if run.task.kind is None:
        yield (
            "masking",
            f"{data.mlm_probability:.0%} of the residues; of these {data.mask_fraction:.0%} masked, "
            f"{data.random_fraction:.0%} replaced at random",
        )
    if data.limit is not None:
        yield "data used", f"the first {data.limit:,} proteins of each split"
    if data.split is not None:
        yield "splits", f"{plain(data.split)} by {plain(data.split_by)}, seed {data.split_seed}"
    yield "optimizer", f"Adam, betas {optim.betas[0]:g} and {optim.betas[1]:g}, epsilon {optim.eps:g}"
    yield "learning rate", f"{optim.lr:g}, {schedule.name}, {schedule.warmup_steps:,} steps of warmup"
    yield "weight decay", f"{optim.weight_decay:g}"
    yield "gradient clipping", f"{optim.clip_grad:g}"
    yield "precision", run.model.precision
    yield "dropout", f"hidden {run.model.hidden_dropout:g}, attention {run.model.attention_dropout:g}"
    if run.task.kind is not None:
        frozen = plain(", ".join(run.finetune.freeze))
        trained = {"full": f"all but {frozen}" if frozen else "all", "frozen": "the head alone"}
        yield "trained weights", trained.get(run.finetune.mode, "adapters and head")
        yield "dropout of the head", f"{run.task.dropout:g}"
    yield from _lora(history)
    if run.init_from is not None:
        yield "started from", plain(shared_name(run.init_from))
    yield "seed", str(run.seed)
    yield "parallel layout", _layout(run)


def _lora(history: History) -> Iterator[tuple[str, str]]:
    lora = history.run.lora
    if lora.rank is None:
        return
    kinds = [name for name, used in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if used]
    yield (
        "LoRA",
        f"rank {lora.rank}, scale {lora.scaling:g}, dropout {lora.dropout:g}, on "
        f"{plain(', '.join(lora.target_modules))}{''.join(f', {kind}' for kind in kinds)}",
    )
    if history.adapters == "merged":
        yield "adapters", "merged into the weights"


def _layout(run: Run) -> str:
    parallel = run.parallel
    return (
        f"tensor {parallel.tensor_model_parallel_size}, pipeline {parallel.pipeline_model_parallel_size}"
        f"{f', context {parallel.context_parallel_size}' if parallel.context_parallel_size > 1 else ''}"
        f"{', sequence parallel' if parallel.sequence_parallel else ''}"
    )
