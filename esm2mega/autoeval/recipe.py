"""Chooses the settings with which `autoeval` fine-tunes, from the size of the data and of the model.

They are one sensible choice for all tasks, made beforehand, so that results can be compared; nobody's
published recipe. What the user gives as ``KEY=VALUE`` comes after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from esm2mega.autoeval.tasks import LORA
from esm2mega.config.best_metric import HEADLINES
from esm2mega.config.load import values_of

PROTEINS_PER_STEP = 32
_TOKENS_PER_PACK = 4096
_STEPS = 2000
"""Bounds the length of a run, but for one pass over the proteins, which it has at least."""
_MOST_EPOCHS = 20
_PATIENCE = 5
_LARGE = 100_000_000
"""Is the number of parameters from which on full fine-tuning takes the smaller learning rate."""
_LEARNING_RATES = {LORA: 1e-3, "small": 1e-3, "large": 5e-5}
"""Gives the peak rates; those of full fine-tuning are those of the shipped configurations of FLIP."""


def finetune_settings(
    mode: str, kind: str, num_train: int, longest: int, parameters: int, given: Sequence[str] = ()
) -> list[str]:
    """Return the overrides of `esm2mega finetune` besides data, task and checkpoint.

    Args:
        mode: ``finetune`` or ``lora``.
        kind: The value of `task.kind`.
        num_train: Number of training proteins.
        longest: Number of residues of the longest protein.
        parameters: Number of parameters of the model.
        given: The user's ``key=value``, which come after these; the warmup is a tenth of their length.
    """
    max_steps, max_epochs = values_of(["train.max_steps", "train.max_epochs"], None, given)
    steps = math.ceil(num_train / PROTEINS_PER_STEP)
    epochs = max_epochs or max(1, min(_MOST_EPOCHS, _STEPS // steps))
    rate = _LEARNING_RATES[LORA if mode == LORA else "large" if parameters >= _LARGE else "small"]
    settings = {
        "data.max_seq_length": longest + 2,
        "train.micro_batch_size": max(1, _TOKENS_PER_PACK // (longest + 2)),
        "train.global_batch_size": PROTEINS_PER_STEP,
        "train.max_epochs": "null" if max_steps else epochs,
        "train.eval_every": steps,
        "train.early_stopping.patience": _PATIENCE,
        "optim.lr": f"{rate:g}",
        "schedule.warmup_steps": (max_steps or steps * epochs) // 10,
        "checkpoint.best_metric": f"valid_{HEADLINES[kind]}",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [*words, "finetune.mode=lora", "lora.rank=8", "lora.alpha=16"] if mode == LORA else words
