"""Lists the names that configuration keys and options had in earlier versions.

A user who writes an old name is told the new one. Files that an earlier version wrote keep their old names,
and are read through the same tables: configurations of runs and checkpoints, and the settings that `embed`
and `score` note beside and inside their output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

RENAMED = {
    "infer.long": "infer.too_long",
    "infer.pack_tokens": "infer.micro_batch_tokens",
    "--long": "--too-long",
}
"""Maps an old dotted key or option to the new one."""

REMOVED = {"optim.name": "adam"}
"""Maps a dotted key that is gone to the only value that it could have."""

_NOTED_SECTION = "infer."
"""Names the section of the keys whose last part names a noted setting of `embed`."""


def current_key(key: str) -> str:
    """Return the name that a key has now, which is the same for a key that was not renamed."""
    return RENAMED.get(key, key)


def current_settings(noted: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that `embed` or `score` noted, under the names that they have now."""
    return {
        current_key(f"{_NOTED_SECTION}{name}").removeprefix(_NOTED_SECTION): value
        for name, value in noted.items()
    }


def refusal_of_key(key: str, value: str) -> str | None:
    """Return why a user's key is refused, in one line, or None for one that was neither renamed nor removed.

    Args:
        key: Dotted key.
        value: Value that the user gave it, as text.
    """
    if key in REMOVED:
        return f"{key}: removed, since {REMOVED[key]} was its only value; leave it out"
    successor = RENAMED.get(key)
    return successor and f"{key}: renamed to {successor}; write {successor}={value}"


def refusal_of_option(option: str, accepted: Collection[str]) -> str | None:
    """Return why an option is refused, in one line, or None if this command did not have it before.

    Args:
        option: Option as the user wrote it, with its dashes.
        accepted: Options of the command.
    """
    successor = RENAMED.get(option)
    return f"{option}: renamed to {successor}" if successor in accepted else None
