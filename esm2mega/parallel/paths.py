"""Expands the paths of a configuration on rank 0, for all ranks."""

from __future__ import annotations

from datetime import timedelta

from esm2mega.config.paths import expanded, is_expanded
from esm2mega.config.schema import Run
from esm2mega.parallel.errors import on_one_rank


def expand_paths(run: Run) -> Run:
    """Return a configuration with `~`, `{version}` and `{time}` expanded in its paths.

    All ranks call this together with the same configuration. Without anything to expand they do not meet.

    Raises:
        UserError: `esm2mega.config.paths.expanded` refuses a path.
    """
    if is_expanded(run):
        return run
    return on_one_rank(lambda: expanded(run), timedelta(minutes=run.parallel.timeout_minutes))
