"""Notes the commands of a suite so that they hold wherever its folder and its models are moved.

Paths in the folder of results are noted relative to it, and those of models as they were at the first start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class Places:
    """Knows where a suite and its models lie now."""

    def __init__(self, out: Path, models: Mapping[str, str]) -> None:
        """Remember the places.

        Args:
            out: Folder of results, as it begins the paths in commands.
            models: Where each model lies now, by its path at the first start.
        """
        self._out = out
        self._now, self._first = dict(models), {now: first for first, now in models.items()}

    def noted(self, command: Sequence[str]) -> list[str]:
        """Return a command as files of the suite note it."""
        return [_changed(word, self._noted_path) for word in command]

    def shown(self, noted: Sequence[str]) -> list[str]:
        """Return a noted command with the models where they are now, to be run in the folder of results."""
        return [_changed(word, lambda path: self._now.get(path, path)) for word in noted]

    def _noted_path(self, path: str) -> str:
        if path in self._first:
            return self._first[path]
        return str(Path(path).relative_to(self._out)) if Path(path).is_relative_to(self._out) else path


def _changed(word: str, change: Callable[[str], str]) -> str:
    """Change a path, or that behind the key of ``KEY=PATH``; of what is no path `change` returns the same."""
    key, equals, value = word.partition("=")
    found = change(word)
    return f"{key}={change(value)}" if found == word and equals else found
