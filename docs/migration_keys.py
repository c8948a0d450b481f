"""Writes docs/migrate/keys.md: the configuration keys of five earlier systems, with what takes their place.

    python docs/migration_keys.py            write the page
    python docs/migration_keys.py --check    end with 1 if the page is not what would be written

The tables are those by which `esm2mega translate` and the answers to wrong keys go.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from esm2mega.config.foreign.rules import Rule, Table
from esm2mega.config.foreign.systems import TABLES
from esm2mega.config.scalars import written

PAGE = Path(__file__).parent / "migrate" / "keys.md"

INTRODUCTION = (
    "# Keys of earlier systems, and ours",
    "`esm2mega translate THEIR_FILE --out OURS.yaml` goes by these tables, and so do the answers to a key, "
    "an option or a file of theirs that is given to another command. A file is recognised by its keys, a "
    "script "
    "by the program that it starts. `section.*` stands for all keys of a section that have no row of their "
    "own. What the keys of ours mean: [conf/base.yaml](../../conf/base.yaml).",
    "Under *without a key* stands what a system did that our defaults do not; `translate` writes it into the "
    "file. A value that has no counterpart is listed by `translate` with its reason, as is a key that stands "
    "in no table.",
    "This page is written from the code by `make migration-keys`; a test compares.",
)
WIDTH = 130
"""Columns of the page's paragraphs."""

OTHERS = {"elsewhere": "done elsewhere", "same": "needs nothing", "absent": "nothing like it"}


def names(table: Table, rule: Rule) -> str:
    """Return the keys of a rule as users of that system write them."""
    return ", ".join(f"`{table.written(name)}`" for name in rule.theirs)


def rows(cells: Iterable[Sequence[str]], head: Sequence[str]) -> list[str]:
    """Return a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]


def reason(rule: Rule) -> str:
    """Return why a key needs nothing here, with the values of which that holds."""
    return f"{rule.note} (for {' or '.join(rule.only)} alone)" if rule.only else rule.note


def section(table: Table) -> list[str]:
    """Return the part of the page about one table."""
    keys = [
        (names(table, rule), ", ".join(f"`{ours}`" for ours in rule.ours) or "-", rule.note)
        for rule in table.rules
        if rule.kind == "key"
    ]
    others = [
        (names(table, rule), OTHERS[rule.kind], reason(rule))
        for kind in OTHERS
        for rule in table.rules
        if rule.kind == kind
    ]
    habits = [
        (f"`{habit.ours}`", f"`{written(habit.value)}`", habit.why, habit.when) for habit in table.habits
    ]
    return [
        f"## {table.system}: {table.title.replace('`', '')}",
        "",
        *rows(keys, ("theirs", "here", "to know")),
        *(["", *rows(others, ("theirs", "here", "why, or where"))] if others else []),
        *(["", *rows(habits, ("without a key", "value", "what it did", "in"))] if habits else []),
    ]


def page() -> str:
    """Return the page."""
    paragraphs = [textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in INTRODUCTION]
    sections = ["\n".join(section(table)) for table in TABLES]
    return "\n\n".join([*paragraphs, *sections]) + "\n"


def main(arguments: Sequence[str]) -> int | str:
    """Write the page, or compare it; return the exit status."""
    if list(arguments) == ["--check"]:
        same = PAGE.read_text(encoding="utf-8") == page()
        return 0 if same else f"{PAGE.name} is not what the tables say; run make migration-keys"
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
