"""Decides from patterns of names which weights of a fine-tuned model are trained, and how fast."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from esm2mega.checkpoint.tensor_filter import TASK_HEAD
from esm2mega.config.schema import FinetuneConfig
from esm2mega.errors import UserError
from esm2mega.model.freezing import freeze, gathered, refuse_split_layers

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def set_trainable(chunks: Sequence[Any], config: FinetuneConfig) -> str:
    """Freeze the weights that `config` names, before the chunks are wrapped; all ranks call this together.

    Args:
        chunks: This rank's chunks with their initial weights; without adapters.
        config: Mode and patterns.

    Returns:
        A line that says what is trained.

    Raises:
        UserError: A pattern matches no weight or freezes one in some layers only, or all weights are frozen.
    """

    # What the model of a user froze when it was made.
    kept = set(
        gathered(
            chunk.global_parameter_name(name)
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if not parameter.requires_grad
        )
    )

    def is_trained(name: str) -> bool:
        if name in kept or any(fnmatch.fnmatchcase(name, pattern) for pattern in config.freeze):
            return False
        return config.mode == "full" or name.startswith(TASK_HEAD)

    freeze(chunks, is_trained)
    for chunk in chunks:
        chunk.frozen = config.mode == "frozen"
    names = gathered(
        chunk.global_parameter_name(name) for chunk in chunks for name, _ in chunk.named_parameters()
    )
    trained_names = list(filter(is_trained, names))
    frozen_by = f"finetune.freeze={config.freeze}"
    if kept:
        frozen_by = f"{type(chunks[0]).__name__} with {frozen_by}"
    refuse_split_layers(names, is_trained, frozen_by)
    _check_patterns("finetune.freeze", config.freeze, names, "weight")
    if not trained_names:
        raise UserError(f"{frozen_by} freezes every weight; leave some to train")
    return f"weights  {len(trained_names)} of {len(names)} tensors are trained (finetune.mode={config.mode})"


def scales_of(chunks: Sequence[Any], config: FinetuneConfig) -> dict[Tensor, float]:
    """Return the factors of the learning rate that are not 1; all ranks call this together.

    Args:
        chunks: This rank's chunks, as they will be trained.
        config: Patterns, and the factor between a layer and the next one.

    Returns:
        Parameter -> factor.

    Raises:
        UserError: A pattern matches no trained weight.
    """
    trained = {
        chunk.global_parameter_name(name): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }
    names = gathered(trained)
    _check_patterns("finetune.lr_scale", config.lr_scale, names, "weight that is trained")
    num_layers = chunks[0].config.num_layers
    scales = {}
    for name, parameter in trained.items():
        matching = [
            factor for pattern, factor in config.lr_scale.items() if fnmatch.fnmatchcase(name, pattern)
        ]
        scale = (matching or [1.0])[-1] * config.layer_decay ** _layers_behind(name, num_layers)
        if scale != 1.0:
            scales[parameter] = scale
    return scales


def _check_patterns(key: str, patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """Refuse a pattern of a configuration key that matches none of the names."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:3])
            raise UserError(f"{key}: {pattern!r} matches no {what}; names are such as {shown}")


def _layers_behind(name: str, num_layers: int) -> int:
    """Count the layers from this weight's own to the head: 1 for the last layer, most for the embedding."""
    if name.startswith("embedding."):
        return num_layers + 1
    layer = _LAYER.match(name)
    return num_layers - int(layer[1]) if layer else 0
