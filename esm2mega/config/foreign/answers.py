"""Answers a key, an option or a file of another system with what does the same here, in one line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from esm2mega.config.foreign.reading import flat, program_of, table_of
from esm2mega.config.foreign.rules import Rule, Source, Table
from esm2mega.config.foreign.systems import PROGRAMS, rules_for
from esm2mega.config.foreign.values import Untranslated
from esm2mega.config.scalars import Unset, as_word
from esm2mega.errors import UserError


def answer(name: str, value: Any = None) -> str | None:
    """Return whose key this is and what to write here in its place, or None for a key of none of the systems.

    Args:
        name: Dotted key, or option with its dashes.
        value: What the user gave it, or None where it is not known; of a section, the mapping below it.
    """
    if isinstance(value, dict):
        leaf = next(iter(flat(value, f"{name}.")), None)
        return None if leaf is None else answer(*leaf)
    systems: dict[str, list[str]] = {}
    # Keys come first: they say more than that another system needs none of this name.
    for table, rule, canonical in sorted(rules_for(name), key=lambda found: found[1].kind != "key"):
        names = systems.setdefault(_advice(rule, canonical, value), [])
        if table.system not in names:
            names.append(table.system)
    if not systems:
        return None
    return "; ".join(f"of {_joined(names)}: {advice}" for advice, names in systems.items())


def _joined(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _advice(rule: Rule, canonical: str, value: Any) -> str:
    """Return what to do instead of a key."""
    if rule.kind == "elsewhere":
        return f"done elsewhere: {rule.note}"
    if rule.kind == "absent":
        return f"there is nothing like it here: {rule.note}"
    if not rule.ours:
        return f"no key is needed: {rule.note}"
    keys, note = f"here {', '.join(rule.ours)}", f" ({rule.note})" if rule.note else ""
    if value is None or isinstance(value, Unset):
        return keys + note
    try:
        settings = rule.apply(value, Source({canonical: value}))
    except Untranslated as reason:
        return f"{keys}: {reason}"
    if not settings:
        return keys + note
    return f"write {' '.join(as_word(key, ours) for key, ours in settings.items())}{note}"


def refuse_file(path: Path, content: Mapping[Any, Any], ours: Collection[str]) -> None:
    """Refuse the configuration file of another system, with the command that translates it.

    Args:
        path: The file.
        content: What it holds.
        ours: Our dotted keys.

    Raises:
        UserError: More of its keys are those of a table than ours.
    """
    if (table := table_of(content, ours)) is not None:
        raise UserError(_translate(path, table))


def refuse_script(path: Path, text: str) -> None:
    """Refuse a script that starts a program of another system, with the command that translates it.

    Raises:
        UserError: It is one.
    """
    if (program := program_of(text)) is not None:
        raise UserError(_translate(path, PROGRAMS[program]))


def _translate(path: Path, table: Table) -> str:
    return (
        f"{path}: is a configuration of {table.system}; `esm2mega translate {path} --out OURS.yaml` turns it "
        "into one of esm2mega"
    )
