"""Splits names such as ``RUN@best`` into the directory of a run and the checkpoint of it that is meant."""

from __future__ import annotations

import os
import re

from esm2mega.config.hub import cached
from esm2mega.errors import UserError

FORMS = "RUN@best, RUN@last or RUN@step_N"
"""Lists the forms, for messages."""

_FORM = re.compile(r"(?P<run>.+)@(?P<which>best|last|step_\d+)", re.DOTALL)


def split_run(named: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Return the path of a run and what follows the ``@``: ``best``, ``last`` or ``step_N``.

    A path that exists as it is written is returned whole, with None; so is one that has none of the forms.
    """
    text = os.fspath(named)
    found = None if os.path.exists(text) else _FORM.fullmatch(text)
    return (text, None) if found is None else (found["run"], found["which"])


def is_there(named: str | os.PathLike[str]) -> bool:
    """Tell whether a path exists, the run of which it names a checkpoint, or a model in the Hub's cache."""
    return os.path.exists(split_run(named)[0]) or cached(named) is not None


def joined_names(argument: str, text: str) -> list[str]:
    """Return the names of checkpoints that commas join; a path that exists as it is written is one.

    Args:
        argument: Name of the argument, for messages.
        text: Its value.

    Raises:
        UserError: A name is empty.
    """
    names = [text] if is_there(text) else text.split(",")
    if not all(names):
        raise UserError(f"{argument}={text!r}: a name is empty; give runs as RUN,RUN without blanks")
    return names
