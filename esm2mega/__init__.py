"""ESM-2 protein language models on Megatron-Core. Importing this package imports neither torch nor numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esm2mega.version import __version__ as __version__

if TYPE_CHECKING:
    from esm2mega.infer.api import Model as Model
    from esm2mega.infer.api import load as load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `Model` are imported when they are first used: they bring torch with them."""
    if name in __all__:
        from esm2mega.infer import api

        return getattr(api, name)
    raise AttributeError(f"module 'esm2mega' has no attribute {name!r}")
