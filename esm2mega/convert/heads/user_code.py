"""Names the classes of a user's own model, head and loss in a checkpoint: text, compared, never imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esm2mega.errors import UserError

_KEY = "user_code"
"""This key of ``train_state.json`` holds the names; checkpoints of earlier versions do not have it."""

_NAME = re.compile(r"[\w.]+:[\w.<>]+")
_MAIN = "__main__"


@dataclass(frozen=True)
class UserCode:
    """Names the classes that a user brought to a fine-tuning, as ``MODULE:CLASS``.

    Attributes:
        head: Class of the head; None for a head that the configuration names.
        loss: Class of the loss; None for a loss that the configuration names.
        loss_predicts: Whether the loss turns outputs into predictions by a method of its own, so that nothing
            can be predicted without it.
        model: Class of the model around the head; None for the usual one.
    """

    head: str | None = None
    loss: str | None = None
    loss_predicts: bool = False
    model: str | None = None

    def lines(self) -> list[str]:
        """Return a line for each of them, for the first lines of a run."""
        of_model = (("model", self.model), ("head", self.head))
        lines = [f"{what:<8} {name}, of your own code" for what, name in of_model if name is not None]
        if self.loss is not None:
            units = (
                ", which turns outputs into predictions" if self.loss_predicts else "; outputs are not scaled"
            )
            lines.append(f"loss     {self.loss}, of your own code{units}")
        return lines

    def as_state(self) -> dict[str, Any]:
        """Return the entry of ``train_state.json``."""
        return {_KEY: self.as_dict()}

    def as_dict(self) -> dict[str, Any]:
        """Return what is recorded; without a model the entry is that of earlier versions."""
        return {name: value for name, value in asdict(self).items() if name != "model" or value is not None}


def recorded_code(state: Mapping[str, Any], location: Path) -> UserCode | None:
    """Return the classes that a checkpoint records; None if an earlier version wrote it.

    Args:
        state: Content of its ``train_state.json``.
        location: The checkpoint, for messages.

    Raises:
        UserError: The entry is damaged.
    """
    if _KEY not in state:
        return None
    try:
        code = UserCode(**state[_KEY])
    except TypeError:
        code = UserCode(head="")
    for name in (code.head, code.loss, code.model):
        # The names are shown to the user: nothing but names may stand there.
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise UserError(f"{location}: {_KEY} in train_state.json is damaged; use another checkpoint")
    return code


def name_of(cls: type) -> str:
    """Return the qualified name of a class as ``MODULE:CLASS``.

    A class of the program itself gets the name by which others import the program, if it has one.
    """
    module = cls.__module__
    if module == _MAIN:
        main = sys.modules[_MAIN]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:
            module = spec.name
        elif file is not None:
            module = Path(file).stem
    return f"{module}:{cls.__qualname__}"


def is_same(one: str, other: str) -> bool:
    """Tell whether two names mean one class; of a notebook's classes only the names within it are known."""
    (module, name), (other_module, other_name) = one.split(":"), other.split(":")
    return name == other_name and (module == other_module or _MAIN in (module, other_module))
