"""Reads values as other systems write them, and computes ours from them: numbers, schedules, names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from esm2mega.config.architecture import PUBLISHED
from esm2mega.config.presets import PRESETS
from esm2mega.config.scalars import Unset, shown

PRECISIONS = {
    **dict.fromkeys(("32", "32-true", "fp32", "float32", "no"), "fp32"),
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true", "bfloat16", "cbfloat16"), "bf16"),
    **dict.fromkeys(("16", "16-mixed", "16-true", "fp16", "float16"), "fp16"),
}
"""Maps the names of precisions to ours."""

METRICS = {
    "val_loss": "valid_loss",
    "eval_loss": "valid_loss",
    "loss": "valid_loss",
    "val_acc": "valid_accuracy",
    "val_mse": "valid_mse",
}
"""Maps the names of monitored metrics to ours."""

_SIZES = {name.rpartition("/")[2]: size for name, size in PUBLISHED.items()}
_TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


BATCHES_AHEAD = "batches are built ahead by a thread; `data.workers` adds processes"
ONLY_ADAM = "Adam with decoupled weight decay is the only optimizer"
OF_ONE_PROCESS = (
    "train.global_batch_tokens is that of one process; multiply it by the number of data-parallel processes"
)
"""These are notes that several tables have."""


class Untranslated(Exception):
    """Says why a value has no counterpart here; never reaches the user as an error."""


def text(value: Any) -> str:
    """Return a value that is text."""
    if not isinstance(value, str) or isinstance(value, Unset) or not value:
        raise Untranslated(f"{shown(value)} is not text")
    return value


def number(value: Any) -> float:
    """Return a value that is a number; YAML's ``2_000`` is one."""
    try:
        found = float(text(value))
    except ValueError:
        raise Untranslated(f"{shown(value)} is not a number") from None
    if not math.isfinite(found):
        raise Untranslated(f"{shown(value)} is not a finite number")
    return found


def integer(value: Any) -> int:
    """Return a value that is a whole number."""
    found = number(value)
    if found != int(found):
        raise Untranslated(f"{shown(value)} is not a whole number")
    return int(found)


def truth(value: Any) -> bool:
    """Return a value that is true or false."""
    found = _TRUTH.get(shown(value).lower())
    if found is None:
        raise Untranslated(f"{shown(value)} is neither true nor false")
    return found


def items(value: Any) -> list[Any]:
    """Return a list as it is, and any other value as the only item of one."""
    return value if isinstance(value, list) else [value]


def texts(value: Any) -> list[str]:
    """Return a list of texts; one text alone is such a list."""
    return [text(item) for item in items(value)]


def numbers(value: Any) -> list[float]:
    """Return a list of numbers."""
    if not isinstance(value, list):
        raise Untranslated(f"{shown(value)} is not a list of numbers")
    return [number(item) for item in value]


def one_of(names: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return a conversion that maps names, in any case, to ours."""

    def convert(value: Any) -> Any:
        name = shown(value).lower()
        if name not in names:
            raise Untranslated(f"{shown(value)} is none of {', '.join(names)}")
        return names[name]

    return convert


def metric(value: Any) -> str:
    """Return our name of a metric by which the best checkpoint is chosen."""
    if text(value) not in METRICS:
        raise Untranslated("checkpoint.best_metric takes what evaluations measure, such as valid_loss")
    return METRICS[value]


def resumed(value: Any) -> str:
    """Return `checkpoint.resume` for whether a start goes on with an existing run."""
    return "auto" if truth(value) else "never"


def clip(value: Any) -> float:
    """Return the largest norm of gradients; 0 and less switch clipping off."""
    return max(0.0, number(value))


def whole_split(value: Any) -> int:
    """Return `train.eval_batches` for a number of batches in an evaluation, or a fraction of the split."""
    if isinstance(value, Unset) or text(value) in ("1.0", "1"):
        return 0
    raise Untranslated(
        "counts batches of proteins, train.eval_batches packs of tokens; left out, data.valid is evaluated "
        "whole"
    )


def model_of(name: Any) -> dict[str, Any]:
    """Return the model that a name or directory of Hugging Face stands for, without its weights.

    The published ones are known by their names.
    """
    size = _SIZES.get(text(name).rstrip("/").rpartition("/")[2])
    return {"model.from": name} if size is None else {"model.size": size}


def ratio(part: float, whole: float | None) -> float:
    """Return a rate as a fraction of the peak rate, without the noise of binary fractions."""
    if not whole:
        raise Untranslated("it is a fraction of the peak learning rate, which the file does not set")
    return float(f"{part / whole:.6g}")


def end_of_hold(warmup: float, steps: float, held: float) -> int:
    """Return the step at which the line from the peak after warmup to 0 at the end reaches a fraction."""
    return round(warmup + (1 - held) * (steps - warmup))


def shaped(settings: dict[str, Any]) -> None:
    """Name the preset that has the dimensions of a model, if one has; FFN is four times hidden by default."""
    names = [
        f"model.{name}" for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    ]
    if settings.get("model.hidden_size") and all(settings.get(names[i]) for i in (0, 3)):
        settings.setdefault("model.ffn_hidden_size", 4 * settings["model.hidden_size"])
    shape = tuple(settings.get(name) for name in names)
    size = next((size for size, preset in PRESETS.items() if tuple(preset) == shape), None)
    if size is not None and settings.get("model.family", "esm2") == "esm2":
        for name in names:
            del settings[name]
        settings["model.size"] = size


def next_version(settings: dict[str, Any]) -> bool:
    """Give every start a directory of its own, if it goes on with no other; tell whether that is so."""
    if settings.get("checkpoint.resume") != "never" or "run_dir" not in settings:
        return False
    settings["run_dir"] = f"{settings['run_dir'].rstrip('/')}/version_{{version}}"
    return True
