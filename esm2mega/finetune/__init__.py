"""Fine-tunes models on labelled proteins: the run, its losses and metrics, and prediction afterwards."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esm2mega.finetune.api import TrainedModel as TrainedModel
    from esm2mega.finetune.api import evaluate_model as evaluate_model
    from esm2mega.finetune.api import infer_model as infer_model
    from esm2mega.finetune.api import train_model as train_model

__all__ = ["TrainedModel", "evaluate_model", "infer_model", "train_model"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used, because it brings torch with it."""
    if name in __all__:
        return getattr(import_module("esm2mega.finetune.api"), name)
    raise AttributeError(f"module 'esm2mega.finetune' has no attribute {name!r}")
