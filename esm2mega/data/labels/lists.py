"""Reads lists that other programs wrote as the text of a cell.

pandas and Hugging Face's datasets write ``[0, 1]``, ``(0, 1)`` or ``['C', 'H']`` to CSV, JSON has ``null``
and double quotes, numpy leaves the commas out, and tables made by hand have commas alone.
"""

from __future__ import annotations

import re

from esm2mega.files import parse_json

MARKS = frozenset(",[](){}'\"")
"""These characters belong to the writing of a list."""

_CLOSING = {"[": "]", "(": ")"}
_ITEM = re.compile(
    r"""(?:'(?P<single>[^'\\]*)'|"(?P<double>[^"\\]*)"|(?P<bare>[^\s,'"()\[\]{}]+))(?P<gap>\s*,\s*|\s+|$)"""
)
_SCALAR = re.compile(r"np\.\w+\(([^()]*)\)")
_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_FLOAT = re.compile(r"-?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")
_CONSTANTS = {
    **dict.fromkeys(("None", "null", "nan", "NaN", "<NA>")),
    **dict.fromkeys(("True", "true"), True),
    **dict.fromkeys(("False", "false"), False),
}


def is_list(text: str) -> bool:
    """Return whether a cell looks like a list: it begins with a bracket that is closed, or has commas."""
    text = text.strip()
    return "," in text or (len(text) > 1 and text[-1] == _CLOSING.get(text[0]))


def list_of(text: str, bare_text: bool = True) -> list[object]:
    """Return the entries of a list: text, numbers, booleans, and None where a value is missing.

    Args:
        text: A cell for which `is_list` holds.
        bare_text: Whether text may stand without quotes.

    Raises:
        ValueError: It cannot be read; says why.
    """
    text = text.strip()
    bracket = text[0] if len(text) > 1 and text[-1] == _CLOSING.get(text[0]) else ""
    body = text[1:-1] if bracket else text
    try:
        return parse_json(f"[{body}]")
    except ValueError:
        return _items(_SCALAR.sub(r"\1", body).strip(), bracket == "(", bare_text)


def _items(body: str, is_tuple: bool, bare_text: bool) -> list[object]:
    """Return the entries of a list that is not JSON."""
    items: list[object] = []
    gaps, place = [], 0
    while place < len(body):
        found = _ITEM.match(body, place)
        if found is None:
            raise ValueError(f"cannot be read at {body[place : place + 12]!r}")
        items.append(_item(found, bare_text))
        gaps.append("," in found["gap"])
        place = found.end()
    if gaps and gaps[-1] and not (is_tuple and len(items) == 1):
        raise ValueError("ends with a comma")
    if len(set(gaps[:-1])) > 1:
        raise ValueError("has commas between some of its entries and blanks between others")
    return items


def _item(found: re.Match[str], bare_text: bool) -> object:
    word = found["bare"]
    if word is None:
        return found["single"] if found["double"] is None else found["double"]
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if word == "...":
        raise ValueError("was shortened with '...' when it was written")
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word):
        return float(word)
    if not bare_text:
        raise ValueError(f"has the text {word[:20]!r} without quotes")
    return word
