"""Has the import of Megatron-Core load no compiler: its fused functions are compiled when they are called.

Its decorator for them is `torch.compile`, which loads all of PyTorch's compiler when it decorates, a third of
the time in which a command starts, and most commands call none of these functions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "megatron.core"


def install() -> None:
    """Have the import of Megatron-Core, if it is still to come, load no compiler."""
    if PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Lets the other finders find the package, and changes how it is executed, which happens once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                sys.meta_path.remove(self)
                with _compiling_later():
                    execute(module)

            loader.exec_module = exec_module
        return spec


@contextmanager
def _compiling_later() -> Iterator[None]:
    """Have `torch.compile` return functions that compile themselves when they are first called."""
    import torch

    compile_now: Any = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # What is being compiled around it takes the function in.
            is_traced = torch.compiler.is_compiling()
            return function(*args, **kwargs) if is_traced else compiled()(*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
