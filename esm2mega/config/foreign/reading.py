"""Reads files of other systems: YAML, JSON, Hydra files with others beside them, and scripts with options.

Every scalar stays the text that stands there. Of a script the options of the first program that a table
knows are read, word by word; nothing of it is run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from esm2mega.config.foreign.references import Unresolved, resolve_hydra, resolve_shell
from esm2mega.config.foreign.rules import Table
from esm2mega.config.foreign.systems import PROGRAMS, SYSTEMS, recognised
from esm2mega.config.scalars import read_yaml
from esm2mega.errors import UserError

_LARGEST = 1 << 20
"""Limits the bytes of a file."""

_SELF = "_self_"
_BESIDE = re.compile(r"[\w.-]+")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)")
_ENDS = {"|", "|&", "||", "&&", ";", "&", ")", ">", ">>", "2>&1", "<"}
_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_][\w.]*)=(.*)", re.DOTALL)


@dataclass
class Foreign:
    """Holds what a file of another system sets.

    Attributes:
        path: The file.
        table: The table of its keys.
        program: Name of the program whose options they are; empty for a file.
        values: Values by the keys of the table, references replaced where the file holds what they name.
        places: Where each was written, as file:line.
        written: Each key as the file writes it.
        unresolved: Why a reference could not be replaced, by key.
        notes: What else the user should know of the file.
    """

    path: Path
    table: Table
    program: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    unresolved: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, place: str) -> None:
        """Set a value; the last one of a key counts."""
        key = self.table.canonical(name)
        self.values[key], self.places[key], self.written[key] = value, place, name


def flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted keys; lists, also of mappings, are values."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def table_of(content: Mapping[Any, Any], ours: Collection[str]) -> Table | None:
    """Return the table of the system whose file has this content, or None for none of them.

    Args:
        content: What the file holds.
        ours: Our dotted keys, of which it must have fewer than of theirs.
    """
    names = [name for name, _ in flat(content) if name.partition(".")[0] != "defaults"]
    return recognised(names, sum(name in ours for name in names))


def read_foreign(path: Path, ours: Collection[str]) -> Foreign:
    """Read a file of another system.

    Args:
        path: The file.
        ours: Our dotted keys, of which it must have fewer than of theirs.

    Raises:
        UserError: It cannot be read, or is a file of none of the systems.
    """
    text = _text(path)
    problem = "it is neither `key: value` pairs nor a script that starts one of their programs"
    try:
        content, lines = read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        content, lines = None, {}
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
    if isinstance(content, dict):
        if (table := table_of(content, ours)) is not None:
            found = _mapping(path, table, content, lines)
            _resolve(found, {})
            return found
        problem = "too few of its keys are theirs"
    elif (program := program_of(text)) is not None:
        return _script(path, text, program)
    raise UserError(f"{path}: is a file of none of {', '.join(SYSTEMS)}: {problem}; give one of theirs")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path}: is larger than {_LARGEST:,} bytes; give a configuration file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; give a configuration file"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not text in UTF-8 (byte {error.start}); give a configuration file"
        ) from None


def _mapping(
    path: Path, table: Table, content: dict[Any, Any], lines: dict[str, int], above: tuple[Path, ...] = ()
) -> Foreign:
    """Read a file's mapping and, of Hydra, the files beside it that it names; its own values come last."""
    found = Foreign(path, table)
    names = content.pop("defaults", []) if table.hydra else []
    names = names if isinstance(names, list) else [names]
    for name in names if _SELF in names else [*names, _SELF]:
        if name == _SELF:
            for key, value in flat(content):
                found.put(key, value, f"{path}:{lines.get(key, 1)}")
            continue
        is_name = isinstance(name, str) and _BESIDE.fullmatch(name)
        beside = path.with_name(f"{name}.yaml") if is_name else path
        if not is_name or not beside.is_file():
            found.notes.append(
                f"{path}: names {str(name)[:60]} in defaults, which is not beside it; its keys are not known"
            )
        elif beside in above or len(above) > 10:
            raise UserError(f"{beside}: includes itself through defaults; remove the cycle")
        else:
            try:
                inner, inner_lines = read_yaml(_text(beside))
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise UserError(f"{beside}: is not YAML; correct it") from error
            if not isinstance(inner, dict):
                raise UserError(f"{beside}: is not `key: value` pairs; correct it")
            base = _mapping(beside, table, inner, inner_lines, (*above, path))
            for key, value in base.values.items():
                found.put(base.written[key], value, base.places[key])
            found.notes += base.notes
    return found


def program_of(text: str) -> str | None:
    """Return the name of the first program in a script that a table knows, or None."""
    return next((name for word, _ in _words(text) if (name := word.rpartition("/")[2]) in PROGRAMS), None)


def _words(text: str) -> Iterator[tuple[str, int]]:
    """Yield the words of a script with their lines; an empty word ends each command line."""
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("#"):
            continue
        goes_on = stripped.endswith("\\")
        body = stripped[:-1] if goes_on else stripped
        try:
            words = shlex.split(body, comments=True)
        except ValueError:  # an apostrophe in a placeholder, say
            words = body.split()
        yield from ((word, number) for word in words)
        if not goes_on:
            yield "", number


def _script(path: Path, text: str, program: str) -> Foreign:
    """Read the options, the `key=value` words and the positional ones behind a program's name."""
    table = PROGRAMS[program]
    found = Foreign(path, table, program)
    words = list(_words(text))
    starts = [i for i, (word, _) in enumerate(words) if word.rpartition("/")[2] in PROGRAMS]
    variables = {}
    for word, _ in words[: starts[0]]:
        if assigned := _ASSIGNMENT.fullmatch(word):
            variables[assigned[1]] = assigned[2]
    if len(starts) > 1:
        line = words[starts[1]][1]
        found.notes.append(f"{path}:{line}: starts a second program, which is not translated")
    positional, i = list(table.positional), starts[0] + 1
    while i < len(words) and words[i][0] and words[i][0] not in _ENDS:
        word, line = words[i]
        i += 1
        place = f"{path}:{line}"
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            values = [value] if equals else []
            while not equals and i < len(words) and words[i][0] and words[i][0] not in _ENDS:
                if words[i][0].startswith("--") or (table.hydra and _OVERRIDE.fullmatch(words[i][0])):
                    break
                values.append(words[i][0])
                i += 1
            values = _placeholders(values)
            if not (table.hydra and name.strip("-") in ("config-name", "config-path")):
                found.put(name, "true" if not values else values[0] if len(values) == 1 else values, place)
            elif name.endswith("name"):
                found.notes.append(
                    f"{place}: {name} {values[0] if values else ''} names a file; translate that too"
                )
        elif table.hydra and (override := _OVERRIDE.fullmatch(word)):
            found.put(override[1], override[2], place)
        elif positional:
            found.put(positional.pop(0), word, place)
        else:
            found.notes.append(f"{place}: {word[:60]} is not an option, and was left out")
    if 2 * sum(table.rule(name) is not None for name in found.values) < len(found.values):
        raise UserError(
            f"{path}: starts {program}, but with few options that {table.system} has; give a file of theirs"
        )
    _resolve(found, variables)
    return found


def _placeholders(words: list[str]) -> list[str]:
    """Join the words of a placeholder, such as ``<Specify path>``."""
    if words and words[0].startswith("<") and any(word.endswith(">") for word in words):
        return [" ".join(words)]
    return words


def _resolve(found: Foreign, variables: Mapping[str, str]) -> None:
    """Replace references by what the file holds, and note those that lead out of it."""
    values = dict(found.values)
    for key, value in values.items():
        try:
            found.values[key] = _resolved(found, key, value, values, variables)
        except Unresolved as reason:
            found.unresolved[key] = str(reason)


def _resolved(
    found: Foreign, key: str, value: Any, values: Mapping[str, Any], variables: Mapping[str, str]
) -> Any:
    if isinstance(value, list):
        return [_resolved(found, key, item, values, variables) for item in value]
    if type(value) is not str:  # an Unset is no value, and nothing is to be replaced in a mapping
        return value
    if found.program:
        return resolve_shell(value, variables)
    return resolve_hydra(key, value, values)
