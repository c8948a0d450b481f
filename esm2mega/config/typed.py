"""Decides what the type of a configuration key makes of a value that was read as text."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

from esm2mega.config.scalars import Unset

_TRUTH = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
"""Lists the words that are true or false."""

_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)


def as_typed(value: Any, hint: Any, gaps: bool) -> Any:
    """Return a value as OmegaConf takes it for a key; it turns text into numbers where the key is a number.

    Args:
        value: Value from `esm2mega.config.scalars`.
        hint: Type of the key.
        gaps: Whether a list for this key may have nulls in it.

    Returns:
        For a key that is text, or a list of text, the text that stands there. None for a key that is unset.

    Raises:
        ValueError: The key does not take the value, and OmegaConf would not notice.
    """
    kind, optional = _kind(hint)
    if isinstance(value, Unset):
        return str(value) if kind is str and value and not optional else None
    # OmegaConf turns any number into true.
    if kind is bool and str(value).lower() not in _TRUTH and "${" not in str(value):
        raise ValueError
    if kind == list[Any]:
        return _lists_of_text(value)
    if not is_text(hint):
        return _plain(value)
    if not isinstance(value, list) or kind is str:
        if kind == list[str] or not isinstance(value, str) or not value:
            raise ValueError
        return value
    texts = [None if gaps and isinstance(text, Unset) else text for text in value]
    if not all(text is None or (isinstance(text, str) and text) for text in texts):
        raise ValueError
    if kind is Any and not texts:
        raise ValueError
    return [None if text is None else str(text) for text in texts]


def is_text(hint: Any) -> bool:
    """Return whether a key of this type is text or a list of text; those with Any in their type are."""
    kind, _ = _kind(hint)
    return kind is str or kind is Any or kind in (list[str], list[Any])


def expected(hint: Any, gaps: bool) -> str:
    """Say what a key of this type takes; `gaps` is whether a list for it may have nulls in it."""
    kind, optional = _kind(hint)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(kind) is dict:
        return "pairs of a text and a number, as in {embedding.*: 0.1}"
    if kind is Any:
        return "text, a list of texts and nulls, or null" if gaps else "text, a list of texts or null"
    if kind == list[str]:
        return "a list of texts, as in [a, b]"
    if kind == list[Any]:
        return "a list of texts, a list of such lists and nulls, or null"
    return words.get(kind, "a list of numbers") + (" or null" if optional else "")


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return the type of a key without its None, and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0], True
    return hint, False


def _lists_of_text(value: Any, may_nest: bool = True) -> list[Any]:
    """Return a list of texts, or of such lists and nulls; raise `ValueError` for anything else."""
    if not isinstance(value, list) or not value:
        raise ValueError
    entries: list[Any] = []
    for entry in value:
        if isinstance(entry, list) and may_nest:
            entries.append(_lists_of_text(entry, may_nest=False))
        elif isinstance(entry, Unset):
            entries.append(None)
        elif isinstance(entry, str) and entry:
            entries.append(str(entry))
        else:
            raise ValueError
    return entries


def _plain(value: Any) -> Any:
    """Return a value whose nulls are None, with YAML's `.inf` and `.nan` in the spelling of Python."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, str) and _NOT_FINITE.fullmatch(value):
        return value.replace(".", "")
    return None if isinstance(value, Unset) else value
