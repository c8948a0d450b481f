"""Chooses for a fine-tuning what its user has not set: batch, length, learning rate, warmup, evaluations.

The defaults of `conf/base.yaml` are those of a pretraining. What a file or the command line sets is never
changed, and a run that is resumed keeps what its checkpoint has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import replace

from esm2mega.config.batches import (
    PROTEIN_KEYS,
    TOKEN_KEYS,
    data_parallel_size,
    fill_batches,
    shares_of_a_pack,
)
from esm2mega.config.best_metric import HEADLINES, VALID_LOSS
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import resolve_max_steps
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import DataConfig, ModelConfig, ParallelConfig, Run, TrainConfig, flatten
from esm2mega.data.labels.dataset import LabelledProteins

BATCH = (*PROTEIN_KEYS, *TOKEN_KEYS)
LENGTH = ("train.max_steps", "train.max_epochs")
SINGLE = (
    *("optim.lr", "schedule.warmup_steps", "train.eval_every", "train.early_stopping.patience"),
    "checkpoint.best_metric",
)
"""These keys are chosen one by one; of those of `BATCH` and `LENGTH`, all or none."""

_PROTEINS_PER_STEP = ((200, 8), (2000, 16), (math.inf, 32))
"""Pairs the most training proteins with the proteins of a step: few proteins need many small steps."""
_TOKENS_PER_PACK = 4096
_STEPS = 2000
"""Bounds the length of a run, but for one pass over the proteins, which it has at least."""
_MOST_EPOCHS = 20
_PATIENCE = 5
"""Is the number of epochs without improvement that end a run, at least as many evaluations."""

LARGE = 100_000_000
"""Is the number of parameters from which on full fine-tuning takes the smaller learning rate."""
_LEARNING_RATES = {"lora": 1e-3, "frozen": 1e-3, "small": 5e-4, "large": 5e-5}
"""Gives the peak rates, which docs/finetuning.md explains."""


def provisional(run: Run, given: Collection[str], validates: bool) -> Run:
    """Return a run that passes the checks of a configuration, as long as the data are not known.

    Args:
        run: The configuration, in which keys that are not set have the values of a pretraining.
        given: The keys that the user has set.
        validates: Whether there are validation data.
    """
    run = copy.deepcopy(run)
    if not _any_of(LENGTH, given):
        run.train.max_epochs = _MOST_EPOCHS
    if "schedule.warmup_steps" not in given:
        run.schedule.warmup_steps = 0
    if "train.eval_every" not in given:
        run.train.eval_every = int(validates)
    return _with_decay(run, given)


def choose_batch(
    run: Run, given: Collection[str], proteins: LabelledProteins, saved: Run | None
) -> tuple[Run, list[str]]:
    """Choose how many proteins a step takes, unless the user has set anything of the batch.

    Args:
        run: What `provisional` returned.
        given: The keys that the user has set.
        proteins: The training proteins.
        saved: Configuration of the checkpoint that the run resumes; None for a new run.

    Returns:
        The run, and lines for its user.
    """
    if _any_of((*BATCH, "data.pack_window"), given):
        return run, []
    run = copy.deepcopy(run)
    if saved is not None:
        for key in BATCH:
            _copy(key, saved, run)
        return run, []
    world_size = world_size_from_environment()
    dp_size = data_parallel_size(run.parallel, world_size)
    count = len(proteins)
    total = next(size for most, size in _PROTEINS_PER_STEP if count <= most)
    total = math.ceil(total / dp_size) * dp_size
    tokens = sum(min(length + 2, run.data.max_seq_length) for length in proteins.lengths.tolist()) / count
    run.train.micro_batch_size = _pack_size(total // dp_size, tokens, run.data, run.parallel)
    run.train.global_batch_size = total
    fill_batches(run.train, run.data)
    return run, [
        f"chosen   train.global_batch_size={total} and train.micro_batch_size={run.train.micro_batch_size}, "
        f"for {count} training proteins of {tokens:.0f} tokens on average"
    ]


def _pack_size(proteins: int, tokens: float, data: DataConfig, parallel: ParallelConfig) -> int:
    """Return the largest `train.micro_batch_size`; in a pipeline, the one with the least padding."""
    most, divisor = _TOKENS_PER_PACK // data.max_seq_length, shares_of_a_pack(parallel)
    sizes = [size for size in range(1, max(most, divisor) + 1) if size * data.max_seq_length % divisor == 0]
    if parallel.pipeline_model_parallel_size == 1:
        # Packs with room left are not padded, see `esm2mega.config.model.tail_multiple`.
        return max((size for size in sizes if size <= proteins), default=sizes[0])

    def padded(size: int) -> int:
        capacity = size * data.max_seq_length
        return math.ceil(proteins / max(1, int(capacity / tokens))) * capacity

    return min(sizes, key=lambda size: (padded(size), -size))


def choose(
    run: Run,
    given: Collection[str],
    validates: bool,
    saved: Run | None,
    num_steps: Callable[[TrainConfig], int],
) -> tuple[Run, list[str]]:
    """Choose everything but the batch that the user has not set.

    Args:
        run: The configuration, with the batch of `choose_batch`.
        given: The keys that the user has set.
        validates: Whether there are validation proteins.
        saved: Configuration of the checkpoint that the run resumes; None for a new run.
        num_steps: Counts the steps of `train.max_epochs`.

    Returns:
        The run, and lines for its user.
    """
    run = copy.deepcopy(run)
    if saved is not None:
        return _as_before(run, given, validates, saved)
    train, lines = run.train, []
    epoch = num_steps(replace(train, max_epochs=1))
    if not _any_of(LENGTH, given):
        train.max_epochs = max(1, min(_MOST_EPOCHS, _STEPS // epoch))
        lines.append(
            f"train.max_epochs={train.max_epochs} ({epoch} steps each; at most {_MOST_EPOCHS} epochs or "
            f"about {_STEPS:,} steps)"
        )
    total = train.max_steps if train.max_epochs is None else num_steps(train)
    if "optim.lr" not in given:
        run.optim.lr, why = _learning_rate(run)
        lines.append(f"optim.lr={run.optim.lr:g}, {why}")
    if "schedule.warmup_steps" not in given:
        run.schedule.warmup_steps = total // 10
        why = f"a tenth of {total} steps"
        if "schedule.decay_steps" in given and run.schedule.decay_steps is not None:
            run.schedule.warmup_steps = min(total // 10, run.schedule.decay_steps - 1)
            why += ", and before the decay ends"
        lines.append(f"schedule.warmup_steps={run.schedule.warmup_steps}, {why}")
    if "train.eval_every" not in given:
        train.eval_every = min(epoch, total) if validates else 0
        lines.append(
            f"train.eval_every={train.eval_every}, {'once an epoch' if validates else 'without data.valid'}"
        )
    if "checkpoint.best_metric" not in given:
        assert run.task.kind is not None
        metric = f"valid_{HEADLINES[run.task.kind]}" if validates else VALID_LOSS
        run.checkpoint.best_metric = metric
        if validates:
            lines.append(f"checkpoint.best_metric={metric}, the usual metric of task.kind={run.task.kind}")
    if "train.early_stopping.patience" not in given and validates and train.eval_every:
        patience = max(_PATIENCE, math.ceil(_PATIENCE * epoch / train.eval_every))
        train.early_stopping.patience = patience
        lines.append(f"train.early_stopping.patience={patience} evaluations without improvement")
    return _with_decay(run, given), [f"chosen   {line}" for line in lines]


def _as_before(run: Run, given: Collection[str], validates: bool, saved: Run) -> tuple[Run, list[str]]:
    """Take from the configuration of a checkpoint what the user has not set."""
    if not _any_of(LENGTH, given):
        for key in LENGTH:
            _copy(key, saved, run)
    kept = [key for key in SINGLE if key not in given]
    for key in kept:
        _copy(key, saved, run)
    if not validates and "train.eval_every" not in given:
        run.train.eval_every = 0
    if not run.train.eval_every and "train.early_stopping.patience" not in given:
        run.train.early_stopping.patience = 0
    values = flatten(run)
    words = ", ".join(f"{key}={values[key]}" for key in kept)
    return _with_decay(run, given), [f"chosen   as in the checkpoint: {words}"] if kept else []


def _learning_rate(run: Run) -> tuple[float, str]:
    """Return the peak rate, and what it is for."""
    mode, parameters = run.finetune.mode, num_parameters(run.model)
    if mode == "lora":
        return learning_rate(mode, parameters), "for adapters and a head"
    if mode == "frozen":
        return learning_rate(mode, parameters), "for a head on a frozen encoder"
    size = "fewer" if parameters < LARGE else "more"
    return learning_rate(
        mode, parameters
    ), f"for all weights of a model of {size} than {LARGE // 10**6}M parameters"


def learning_rate(mode: str, parameters: int) -> float:
    """Return the peak rate for a value of `finetune.mode` and a number of parameters of the encoder."""
    return _LEARNING_RATES[mode if mode in _LEARNING_RATES else "large" if parameters >= LARGE else "small"]


def num_parameters(model: ModelConfig) -> int:
    """Return the number of parameters in the matrices of the encoder, which is nearly that of all."""
    shape = shape_of(model)
    return shape.num_layers * (4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.ffn_hidden_size)


def _any_of(keys: Collection[str], given: Collection[str]) -> bool:
    return any(key in given for key in keys)


def _copy(key: str, source: Run, run: Run) -> None:
    """Give a key the value that it has in another configuration."""
    *sections, name = key.split(".")
    for section in sections:
        source, run = getattr(source, section), getattr(run, section)
    setattr(run, name, getattr(source, name))


def _with_decay(run: Run, given: Collection[str]) -> Run:
    """Let the decay end with the run, whose length may have changed, unless the user has set its end."""
    if "schedule.decay_steps" in given:
        return run
    run.schedule.decay_steps = None
    # The steps of a run that is given in epochs are counted later.
    return run if run.train.max_epochs is not None else resolve_max_steps(run, run.train.max_steps)
