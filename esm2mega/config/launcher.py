"""Reads from the environment which of several processes this one is, as torchrun says."""

from __future__ import annotations

import os
import re

from esm2mega.errors import UserError

_NUMBERS = {
    "RANK": (range(10**6), "the number of a process"),
    "WORLD_SIZE": (range(1, 10**6 + 1), "a number of processes"),
    "LOCAL_RANK": (range(10**6), "the number of a process"),
    "MASTER_PORT": (range(2**16), "a port"),
}
"""Gives the values that each variable may have, and what it numbers."""


def world_size_from_environment() -> int:
    """Return the number of processes of the run; 1 without a launcher.

    Raises:
        UserError: The variables of a launcher are incomplete, are no numbers, or contradict each other.
    """
    given = {name: os.environ[name] for name in _NUMBERS if name in os.environ}
    for name, text in given.items():
        valid, what = _NUMBERS[name]
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) not in valid:
            raise UserError(
                f"environment variable {name}={text} is not {what}; let torchrun set it, or unset "
                f"{', '.join(given)} for a single process"
            )
    rank, size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    if "RANK" in given and "WORLD_SIZE" not in given:
        raise UserError(_lacking(f"RANK={rank}", "WORLD_SIZE"))
    if size > 1 and "RANK" not in given:
        raise UserError(_lacking(f"WORLD_SIZE={size}", "RANK"))
    if rank >= size:
        raise UserError(
            f"RANK={rank} is not below WORLD_SIZE={size}, though ranks count from 0; let torchrun set both"
        )
    return size


def _lacking(given: str, missing: str) -> str:
    name = given.partition("=")[0]
    return (
        f"{given} is set, as for one of several processes, but not {missing}; start with torchrun, which "
        f"sets all of them, or unset {name}"
    )
