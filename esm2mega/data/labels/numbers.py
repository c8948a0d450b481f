"""Reads numbers as people write them: with a decimal point or comma, and with marks between thousands.

What a comma or a point means is said once for all tables (`data.numbers`), never guessed: ``1,234`` is
another number in Berlin than in Boston.
"""

from __future__ import annotations

import re

PLAIN, DECIMAL_COMMA, THOUSANDS_COMMA = "plain", "decimal_comma", "thousands_comma"

_EXPONENT = r"(?:[eE][+-]?[0-9]+)?"
# A group of thousands begins with no zero: 0.123 is no 123, whatever was said of the table.
_GROUPS = "[1-9][0-9]{0,2}(?:%s[0-9]{3})+"
_DOTS, _BLANKS, _COMMAS = (_GROUPS % mark for mark in (r"\.", "['\u2019 \u00a0\u202f]", ","))
_WRITTEN = {
    DECIMAL_COMMA: re.compile(rf"[+-]?(?:{_DOTS}|{_BLANKS}|[0-9]*)(?:,[0-9]*)?{_EXPONENT}"),
    THOUSANDS_COMMA: re.compile(rf"[+-]?(?:{_COMMAS}|[0-9]*)(?:\.[0-9]*)?{_EXPONENT}"),
}
_BETWEEN_THOUSANDS = re.compile("[.'\u2019 \u00a0\u202f]")


def plain_number(value: object) -> float:
    """Return a value or its text as a number; raise `ValueError` for anything else.

    Python's underscores between digits are refused: in a table ``1_000`` is more likely a mistake than 1000.
    """
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def read_number(value: object, written: str) -> float:
    """Return a value, or its text as it is `written`, as a number; raise `ValueError` for anything else.

    Args:
        value: A cell, or a word of it.
        written: ``plain``, ``decimal_comma`` (0,5 or 1.234,5) or ``thousands_comma`` (1,234.5).
    """
    if not isinstance(value, str) or written == PLAIN:
        return plain_number(value)
    text = value.strip()
    if text.lower().lstrip("+-") in ("inf", "infinity", "nan"):
        return plain_number(text)
    if not _WRITTEN[written].fullmatch(text):
        raise ValueError(f"{value!r} is not written as {written}")
    if written == THOUSANDS_COMMA:
        return plain_number(text.replace(",", ""))
    whole, comma, rest = text.partition(",")
    # Without a comma the exponent is in `whole`, and it has no mark of thousands.
    return plain_number(_BETWEEN_THOUSANDS.sub("", whole) + comma.replace(",", ".") + rest)


def write_number(value: int | float, written: str) -> str:
    """Write a number so that `read_number` returns it."""
    text = repr(float(value) if isinstance(value, float) else int(value))
    return text.replace(".", ",") if written == DECIMAL_COMMA else text


def is_written_otherwise(value: object, written: str) -> bool:
    """Return whether a cell that is no number as it is `written` is one in another form."""
    return isinstance(value, str) and bool(_readings(value, written))


def _readings(value: str, written: str) -> dict[str, float]:
    """Return what a text is in all forms but that in which it is `written`."""
    readings = {}
    for other in (PLAIN, DECIMAL_COMMA, THOUSANDS_COMMA):
        try:
            readings[other] = read_number(value, other)
        except ValueError:
            continue
    readings.pop(written, None)
    return readings


def cure(value: object, written: str) -> str:
    """Say what can be done about a cell that is no number as it is `written`."""
    if not isinstance(value, str):
        return "correct it, or leave it empty"
    if "_" in value:
        return "write nothing between thousands"
    readings = _readings(value, written)
    marked = {other: number for other, number in readings.items() if other != PLAIN}
    if PLAIN in readings:
        return f"data.numbers={written} is set, and this has a point for decimals; write all numbers alike"
    if len(marked) > 1:
        return (
            f"it is {marked[DECIMAL_COMMA]:.12g} with a decimal comma and {marked[THOUSANDS_COMMA]:.12g} "
            "with a comma between thousands; set data.numbers=decimal_comma or thousands_comma"
        )
    if DECIMAL_COMMA in marked:
        return "it has a decimal comma; set data.numbers=decimal_comma, or write decimals with a point"
    if THOUSANDS_COMMA in marked:
        return "it has commas between thousands; set data.numbers=thousands_comma, or write nothing there"
    return "correct it, or leave it empty"
