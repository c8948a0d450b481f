"""Expands `~`, `{version}` and `{time}` in the paths of a configuration; other text stays as it is."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

from esm2mega.config.schema import Run, map_paths
from esm2mega.errors import UserError

VERSION, TIME = "{version}", "{time}"
"""These stand for the number of the run directory, and for the start of rank 0, as 2026-11-26_12-30-00."""


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

    The number is that of the newest directory where the run is to be resumed (`checkpoint.resume=auto`), and
    else the next one; the first is 0.

    Raises:
        UserError: A user's home is unknown, or a directory cannot be listed; the time would keep the run from
            finding its checkpoints; or a number is asked for elsewhere than in `run_dir`.
    """
    if TIME in run.run_dir and run.checkpoint.resume == "auto":
        raise UserError(
            f"run_dir={run.run_dir}: {TIME} makes a new directory for every start, in which "
            "checkpoint.resume=auto never finds the run; set checkpoint.resume=never, or name one"
        )
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    number: str | None = None
    if VERSION in run.run_dir:
        newest = _newest_version(expand_user("run_dir", run.run_dir))
        number = str(newest if newest >= 0 and run.checkpoint.resume == "auto" else newest + 1)

    def expand(key: str, path: str) -> str:
        path = expand_user(key, path).replace(TIME, now)
        if VERSION in path and number is None:
            raise UserError(
                f"{key}={path}: {VERSION} is the number of the run directory, and run_dir={run.run_dir} "
                f"does not have one; put {VERSION} into run_dir, or name the path"
            )
        return path if number is None else path.replace(VERSION, number)

    return map_paths(run, expand)


def _newest_version(run_dir: str) -> int:
    """Return the largest number for which there is a directory of this form; -1 if there is none."""
    parts = Path(run_dir).parts
    place = next(number for number, part in enumerate(parts) if VERSION in part)
    form = re.compile(_form(parts[place]))
    folder = Path(*parts[:place]) if place else Path()
    try:
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: {folder} cannot be listed ({error.strerror})") from error
    return max((int(found["n"]) for name in names if (found := form.fullmatch(name))), default=-1)


def _form(name: str) -> str:
    """Return the pattern of a name with `VERSION` in it, whose group ``n`` is the number."""
    before, _, after = name.partition(VERSION)
    escaped = [re.escape(text).replace(re.escape(TIME), ".+") for text in (before, after)]
    return rf"{escaped[0]}(?P<n>0|[1-9]\d*){escaped[1].replace(re.escape(VERSION), '(?P=n)')}"


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
