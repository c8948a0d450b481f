"""Writes tables in Markdown, and text that comes from data so that it is shown as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def count(number: int | None) -> str:
    """Return a number as it is shown; nothing for one that is not known."""
    return "" if number is None else f"{number:,}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown without the columns that are empty in every row."""
    cells = [list(row) for row in rows]
    shown = [n for n in range(len(columns)) if not cells or any(row[n] for row in cells)]
    lines = [[columns[n] for n in shown], ["---"] * len(shown), *([row[n] for n in shown] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Return text that comes from data so that Markdown and HTML show it as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))
