"""Imports the classes of a user's own model, head and loss that the option ``--code`` names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from esm2mega.errors import UserError
from esm2mega.finetune.classes.config import FineTuneConfig
from esm2mega.finetune.losses import TaskLossReduction
from esm2mega.finetune.user_code import GivenCode
from esm2mega.model.heads import TaskHead
from esm2mega.model.heads.task import MakeHead


def load_code(names: Sequence[str]) -> GivenCode:
    """Import the classes that the option ``--code`` names, from the installed packages or this folder.

    Args:
        names: ``MODULE:CLASS``: at most one head and one loss; or the configuration of
            `esm2mega.finetune.classes`, which names both.

    Raises:
        UserError: One cannot be imported, or is none of these.
    """
    make_head: MakeHead | None = None
    loss: TaskLossReduction | None = None
    for text in names:
        cls = _imported(text)
        if isinstance(cls, type) and issubclass(cls, FineTuneConfig):
            if len(names) > 1:
                raise UserError(f"--code {text}: names head and loss itself; give it alone")
            return _instance(text, cls, "configuration").code()
        is_head = isinstance(cls, type) and issubclass(cls, TaskHead)
        if not is_head and not (isinstance(cls, type) and issubclass(cls, TaskLossReduction)):
            raise UserError(
                f"--code {text}: is neither a subclass of esm2mega.model.heads.TaskHead nor of "
                "esm2mega.finetune.losses.TaskLossReduction or esm2mega.finetune.classes.FineTuneConfig; "
                "name the class of a head, of a loss or of a configuration"
            )
        if (make_head if is_head else loss) is not None:
            raise UserError(f"--code {text}: is a second {'head' if is_head else 'loss'}; give one")
        if is_head:
            make_head = cls
            continue
        loss = _instance(text, cls, "loss")
    return GivenCode(make_head, loss)


def _instance(text: str, cls: Any, what: str) -> Any:
    """Make an instance of the class that ``--code`` names; `what` it is of, for the error."""
    try:
        return cls()
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"--code {text}: a {what} is made without arguments, which failed ({line}); give them "
            "defaults, or correct the class"
        ) from error


def _imported(text: str) -> Any:
    module, colon, name = text.partition(":")
    if not (colon and name and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))):
        raise UserError(
            f"--code {text}: is not MODULE:CLASS; for the class MyHead in my_code.py, start the command in "
            "the folder of that file with --code my_code:MyHead"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return attrgetter(name)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"--code {text}: importing {module} failed: {error}; install it") from error
        raise UserError(
            f"--code {text}: there is no module {error.name} in {os.getcwd()} or among the installed "
            "packages; start the command in the folder of the module, or install it"
        ) from error
    except AttributeError as error:
        raise UserError(f"--code {text}: {module} has no {name} ({error}); correct the name") from error
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--code {text}: importing {module} failed: {line}; correct the module") from error
