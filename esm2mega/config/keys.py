"""Lists every valid key with its type, and says what may have been meant by one that is not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator
from typing import Any

from esm2mega.config.architecture import FROM
from esm2mega.config.schema import Run


@functools.cache
def known_keys() -> dict[str, Any]:
    """Return every valid dotted key and its type."""
    return {**dict(_typed_keys(Run, "")), FROM: str | None}


def is_section(key: str) -> bool:
    """Return whether a dotted key has keys below it."""
    return key in _sections()


@functools.cache
def _sections() -> frozenset[str]:
    parents = (known.split(".")[:-1] for known in known_keys())
    return frozenset(".".join(names[: n + 1]) for names in parents for n in range(len(names)))


def refusal_of_unknown(key: str, value: Any) -> str:
    """Return what was meant by an unknown key: one of another system, or the nearest one, in one line."""
    from esm2mega.config.foreign.answers import answer  # with large tables, which other runs do not need

    # A name alone that a key of ours ends with means that key, which is the nearest.
    is_ours = any(known.rpartition(".")[2] == key for known in known_keys())
    advice = None if is_ours else answer(key, value)
    if advice is not None:
        return f"unknown key {key}, which is one {advice}"
    return f"unknown key {key}; the nearest valid key is {nearest_key(key)}"


def nearest_key(key: str) -> str:
    """Return the valid dotted key that was most likely meant by an unknown one."""
    last = key.rpartition(".")[2]
    if last in known_keys():  # such as train.seed, where eval.seed would be more alike, but another thing
        return last

    def likeness(candidate: str) -> tuple[float, float]:
        # The last part counts as much as the whole: a right name in the wrong section finds its section.
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        part = difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()
        return max(whole, part), whole

    return max(known_keys(), key=likeness)


def _typed_keys(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from _typed_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name, hint
