"""Reads YAML and words of the command line, and leaves every scalar as the text that stands there.

YAML's own rules would turn ``007`` into 7, ``on`` into true and ``12:30:00`` into 45000 before anyone knows
what the key is for. Here the type of a key decides, later: see `esm2mega.config.load`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

_MOST_NODES, _DEEPEST = 10_000, 50
"""Limit what a file may expand to through aliases, and its nesting; base.yaml has 300 nodes, and depth 4."""

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"

_YAML_START = ("'", '"', "[", "{", "!")
"""A word that begins like this is read as YAML where the key is text; any other word is the text itself."""

_PLACEHOLDER_START = re.compile(r"\{(version|time)\}")


_PLAIN = re.compile(r"-?[\w/.][\w/.+-]*")
"""Matches text that needs no quotes, in a list or alone."""


_MOST_SHOWN = 200


class Unset(str):
    """Holds an unquoted ``null``, ``~`` or nothing: no value where a key may be unset, else this text."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads every scalar but null as text, whatever it looks like and whatever tag it has."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: dict[Any, Any] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.endswith((":str", ":seq", ":map"))
    }


_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])
_Loader.add_constructor(_NULL, lambda _, node: Unset(node.value))
for _kind in ("int", "float", "bool", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_scalar)


def read_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """Read a YAML document.

    Returns:
        Its content, made of dictionaries, lists and text; and the line of every dotted key of a mapping.

    Raises:
        yaml.YAMLError: The text is not YAML, repeats a key, is nested too deeply, or expands without end.
        RecursionError: It is nested far too deeply.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        lines = dict(_walk(node, (), [0]))
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _walk(
    node: yaml.Node, above: tuple[yaml.Node, ...], visited: list[int], prefix: str = ""
) -> Iterator[Any]:
    """Yield each dotted key with its line, and refuse repeated keys and endless aliases on the way."""
    visited[0] += 1
    for is_wrong, problem in (
        (node in above, "an alias contains itself"),
        (len(above) > _DEEPEST, "nested too deeply"),
        (visited[0] > _MOST_NODES, f"more than {_MOST_NODES:,} values"),
    ):
        if is_wrong:
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, above, visited)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found duplicate key {key.value}", key.start_mark
                    )
                seen.add(key.value)
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _walk(value, above, visited, f"{prefix}{key.value}.")


def read_word(word: str, is_text: bool) -> Any:
    """Read the value of a `key=value` word.

    Args:
        word: What stands behind the equals sign.
        is_text: Whether the key is text or a list of text. The word is then the text itself, whatever it
            would mean in YAML, unless it begins with a quote, bracket, brace or tag.

    Raises:
        yaml.YAMLError: The word is not YAML.
        RecursionError: It is nested too deeply.
    """
    word = word.strip()
    if word in ("", "null", "~"):
        return Unset(word)
    if is_text and (not word.startswith(_YAML_START) or _PLACEHOLDER_START.match(word)):
        return word
    return read_yaml(word)[0]


def as_word(key: str, value: object) -> str:
    """Return the `key=value` word that gives a key exactly this value.

    A program that passes settings on writes them with this, since a name or path may look like a list, like
    null, or like a reference to another key.
    """
    return f"{key}={written(value)}"


def written(value: object) -> str:
    """Return a value as YAML on one line that is read back as exactly this value, reference or not."""
    text = str(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(name)}: {written(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, (int, float)) or (_PLAIN.fullmatch(text) and text != "null"):
        return text
    return yaml.safe_dump(escaped(text), default_style='"', allow_unicode=True, width=float("inf")).strip()


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with every text in it changed, also in lists and mappings; `Unset` stays."""
    if isinstance(value, list):
        return [each_text(item, change) for item in value]
    if isinstance(value, dict):
        return {name: each_text(inner, change) for name, inner in value.items()}
    return change(value) if isinstance(value, str) and not isinstance(value, Unset) else value


def escaped(text: str) -> str:
    r"""Return text in which OmegaConf finds no reference: ``${`` becomes ``\${``."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def literal(text: str) -> str:
    """Return text of a file in which OmegaConf finds no reference; what `escaped` wrote stays as it is."""
    # An odd number of backslashes escapes already.
    return re.sub(r"(\\*)\$\{", lambda found: found[0] if len(found[1]) % 2 else f"{found[1]}\\${{", text)


def show(value: Any) -> str:
    """Return a value as it would be written in YAML, for a message."""
    if value is None or (isinstance(value, Unset) and not value):
        return "null"
    if isinstance(value, str):
        return value if value else "''"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{show(name)}: {show(inner)}' for name, inner in value.items())}}}"
    return f"[{', '.join(map(show, value))}]" if isinstance(value, list) else str(value)


def shown(value: Any) -> str:
    """Return a value as `show` does, cut to the length of a message."""
    text = show(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
