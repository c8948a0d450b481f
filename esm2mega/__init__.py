"""Offers ESM-2 protein language models on Megatron-Core; its import loads neither torch nor numpy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esm2mega.megatron_import import install as _install
from esm2mega.version import __version__ as __version__

if TYPE_CHECKING:
    from esm2mega.finetune.api import evaluate_model as evaluate_model
    from esm2mega.finetune.api import infer_model as infer_model
    from esm2mega.finetune.api import train_model as train_model
    from esm2mega.infer.api import Model as Model
    from esm2mega.infer.api import load as load

_HOMES = {
    "Model": "esm2mega.infer.api",
    "evaluate_model": "esm2mega.finetune.api",
    "infer_model": "esm2mega.finetune.api",
    "load": "esm2mega.infer.api",
    "train_model": "esm2mega.finetune.api",
}
_install()

__all__ = ["Model", "evaluate_model", "infer_model", "load", "train_model"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used, because it brings torch with it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'esm2mega' has no attribute {name!r}")
