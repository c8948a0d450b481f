"""Replaces what refers to other values of the same file, and nothing else: no environment, no command.

Hydra files write ``${model.hidden_size}`` and ``${.name}``, shell scripts ``$NAME``. A file may come from a
stranger, so what refers to anything outside of it stays untranslated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from esm2mega.config.scalars import shown

_MOST_STEPS, _LONGEST = 50, 4096
"""Limit the references that are followed for one value, and the text that they make."""

_HYDRA = re.compile(r"\$\{([^${}]*)\}")
_SHELL = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class Unresolved(Exception):
    """Says what a value refers to that the file does not hold; never reaches the user as an error."""


def resolve_hydra(key: str, text: str, values: Mapping[str, Any]) -> str:
    """Return a value of a Hydra file with the values of other keys in place of its references.

    Args:
        key: Dotted key of the value, from which relative references count.
        text: The value.
        values: All values of the file by dotted keys.

    Raises:
        Unresolved: It refers to the environment, to a function, or to a key that the file does not have.
    """
    if text == "???":
        raise Unresolved("must be given")
    for _ in range(_MOST_STEPS):
        found = _HYDRA.search(text)
        if found is None:
            break
        text = text[: found.start()] + _value(key, found[1].strip(), values) + text[found.end() :]
        if len(text) > _LONGEST:
            raise Unresolved("is too long")
    if "${" in text:
        raise Unresolved(f"refers to {shown(text)}, which leads nowhere")
    return text


def _value(key: str, name: str, values: Mapping[str, Any]) -> str:
    function, colon, arguments = name.partition(":")
    if colon:
        if function == "multiply":
            return _product(arguments)
        raise Unresolved(f"refers to ${{{name}}}, which is not read")
    steps = len(name) - len(name.lstrip("."))
    if steps:
        parents = key.split(".")
        name = ".".join((*parents[: max(0, len(parents) - steps)], name.lstrip(".")))
    value = values.get(name)
    if not isinstance(value, str) or value == "???":
        raise Unresolved(f"refers to ${{{name}}}, which the file does not give")
    return value


def _product(arguments: str) -> str:
    try:
        product = math.prod(float(part) for part in arguments.split(","))
        return str(int(product) if product == int(product) else product)
    except (ValueError, OverflowError):
        raise Unresolved(f"refers to ${{multiply:{arguments}}}, which is no product of numbers") from None


def resolve_shell(text: str, variables: Mapping[str, str]) -> str:
    """Return a word of a shell script with the variables that the script sets to plain text.

    Raises:
        Unresolved: It is a placeholder, or holds an expression, a command or another variable.
    """
    for _ in range(_MOST_STEPS):
        found = _SHELL.search(text)
        if found is None or "$(" in text or "`" in text:
            break
        name = found[1] or found[2]
        if name not in variables:
            raise Unresolved(f"refers to ${name}, which the script does not give")
        text = text[: found.start()] + variables[name] + text[found.end() :]
        if len(text) > _LONGEST:
            raise Unresolved("is too long")
    if text.startswith("<"):
        raise Unresolved("is a placeholder")
    if "$" in text or "`" in text:
        raise Unresolved("is an expression of the shell, which is not run")
    return text
