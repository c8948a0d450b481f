"""Expands `~`, `{version}` and `{time}` in the paths of a configuration; other text stays as it is."""

from __future__ import annotations

import os
from datetime import datetime

from esm2mega.config.schema import Run, map_paths
from esm2mega.errors import UserError
from esm2mega.version import __version__

VERSION, TIME = "{version}", "{time}"
"""These stand for the version of this package, and for the start of rank 0, such as 2026-11-26_12-30-00."""


def is_expanded(run: Run) -> bool:
    """Return whether no path of a configuration holds anything to expand."""
    marked: list[str] = []

    def look(key: str, path: str) -> str:
        if path.startswith("~") or VERSION in path or TIME in path:
            marked.append(key)
        return path

    map_paths(run, look)
    return not marked


def expanded(run: Run) -> Run:
    """Return a copy with expanded paths; one process of a run does this, since clocks and homes differ.

    Raises:
        UserError: A user's home is unknown; or the time would keep the run from finding its checkpoints.
    """
    if TIME in run.run_dir and run.checkpoint.resume == "auto":
        raise UserError(
            f"run_dir={run.run_dir}: {TIME} makes a new directory for every start, in which "
            "checkpoint.resume=auto never finds the run; set checkpoint.resume=never, or name one"
        )
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"

    def expand(key: str, path: str) -> str:
        return expand_user(key, path).replace(VERSION, __version__).replace(TIME, now)

    return map_paths(run, expand)


def expand_user(key: str, path: str) -> str:
    """Return a path with the home directory in place of `~` or `~NAME` at its beginning.

    Raises:
        UserError: There is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(
            f"{key}={path}: no home directory of {path.partition('/')[0]} is known; write the whole path, or "
            f"./{path} for a file of this name"
        )
    return found
