"""Calls a user's own code, and reports an exception in it with the place in that code."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from esm2mega.errors import StoppedBySignal, UserError

T = TypeVar("T")

# The first two are meant as they are; the others are faults of the machine, in whatever code they strike.
_PASSED_ON = (UserError, StoppedBySignal, MemoryError, torch.OutOfMemoryError, dist.DistError)

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def call(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a user's own code.

    Args:
        name: What the function is called, for messages.
        function: The function.
        *arguments: Its arguments.

    Raises:
        UserError: It raised an exception, which is the cause of this one.
    """
    try:
        return function(*arguments)
    except _PASSED_ON:
        raise
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{name} failed{_place(error)}: {line}; correct it") from error


def _place(error: Exception) -> str:
    """Return the line of the user's file at which it failed; nothing for compiled code.

    That is the file of the called function, or the first one that code of this package calls in turn.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]
    frames = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)] or frames
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
