"""Lists the tables of the five systems, and recognises whose file or key something is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from esm2mega.config.foreign import bionemo1, bionemo2, bionemo2_files, cerebras, esm2fa, proteinlm
from esm2mega.config.foreign.rules import Rule, Table

TABLES: tuple[Table, ...] = tuple(
    table
    for system in (bionemo1, bionemo2, bionemo2_files, cerebras, esm2fa, proteinlm)
    for table in system.TABLES
)

PROGRAMS: dict[str, Table] = {name: table for table in reversed(TABLES) for name in table.programs}
"""Maps file names of programs to the table of their options."""

SYSTEMS: tuple[str, ...] = tuple(dict.fromkeys(table.system for table in TABLES))


def recognised(names: Iterable[str], known_here: int = 0) -> Table | None:
    """Return the table that has the most of a file's keys, or None if none has half of them.

    Args:
        names: Dotted keys of the file.
        known_here: Number of these that are ours; a table must have more.
    """
    names = list(names)
    count, table = max(
        ((sum(table.rule(name) is not None for name in names), table) for table in TABLES),
        key=lambda found: found[0],
    )
    return table if count > known_here and 2 * count >= len(names) else None


def rules_for(name: str) -> Iterator[tuple[Table, Rule, str]]:
    """Yield every table that has a key, with its rule and the key as that table writes it.

    A name without dots stands for the last part of a key too, if no table has it as a whole.
    """
    found = False
    for table in TABLES:
        if (rule := table.rule(name)) is not None:
            found = True
            yield table, rule, table.canonical(name)
    if found or "." in name:
        return
    for table in TABLES:
        for rule in table.rules:
            for theirs in rule.theirs:
                if theirs.rpartition(".")[2] == name:
                    yield table, rule, theirs
