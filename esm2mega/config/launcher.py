"""Reads from the environment which of several processes this one is, as torchrun says."""

from __future__ import annotations

import os
import re

from esm2mega.errors import UserError

_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
"""Gives the smallest value of each variable that is a number."""


def world_size_from_environment() -> int:
    """Return the number of processes of the run; 1 without a launcher.

    Raises:
        UserError: The variables of a launcher are incomplete, are no numbers, or contradict each other.
    """
    given = {name: os.environ[name] for name in _LEAST if name in os.environ}
    for name, text in given.items():
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < _LEAST[name]:
            raise UserError(
                f"environment variable {name}={text} is not a number of at least {_LEAST[name]}; let "
                f"torchrun set {', '.join(_LEAST)}, or unset them for a single process"
            )
    rank, size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    if "RANK" in given and "WORLD_SIZE" not in given:
        raise UserError(
            f"RANK={rank} is set, as for one of several processes, but not WORLD_SIZE; start with torchrun, "
            "which sets both, or unset RANK"
        )
    if size > 1 and "RANK" not in given:
        raise UserError(
            f"WORLD_SIZE={size} is set, as for one of several processes, but not RANK; start with torchrun, "
            "which sets both, or unset WORLD_SIZE"
        )
    if rank >= size:
        raise UserError(
            f"RANK={rank} is not below WORLD_SIZE={size}, since ranks count from 0; let torchrun set both"
        )
    return size
