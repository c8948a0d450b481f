"""Describes in tables what each configuration key of another system becomes here.

A rule is of one of four kinds: the key has a counterpart here, what it does is done elsewhere (by a command
or a launcher), it says what esm2mega does anyway, or there is nothing like it. The tables themselves are in
one module for each system; `docs/migrate/keys.md` is written from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esm2mega.config.foreign.values import Untranslated, number, truth
from esm2mega.config.scalars import Unset, shown

Settings = dict[str, Any]
"""Holds values of our configuration by dotted key."""


@dataclass(frozen=True)
class Source:
    """Holds everything that a file of another system sets, for rules that need several keys.

    Attributes:
        values: Text, lists and mappings by their dotted keys, the defaults of that system included.
    """

    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return the value of a key, or None where it is not set."""
        value = self.values.get(key)
        return None if isinstance(value, Unset) else value

    def number(self, key: str) -> float | None:
        """Return the value of a key that is a number, or None where it is not set."""
        value = self.get(key)
        return None if value is None else number(value)


Turn = Callable[[Any, Source], Settings]
Kind = Literal["key", "elsewhere", "same", "absent"]


@dataclass(frozen=True)
class Rule:
    """Says what one key of another system, or several like it, become.

    Attributes:
        theirs: Dotted keys as that system writes them; ``section.*`` stands for all keys of a section.
        kind: Whether there is a key for it, or who does it else, see the head of this module.
        ours: Keys that are set.
        note: What a reader of the table should know; the reason where there is no key.
        turn: Computes our settings from the value; raises `Untranslated` for one without a counterpart.
        only: Values that say what esm2mega does anyway, in lower case; any value does if it is empty.
        remark: What a user should know whose file sets this key.
    """

    theirs: tuple[str, ...]
    kind: Kind
    ours: tuple[str, ...] = ()
    note: str = ""
    turn: Turn | None = None
    only: tuple[str, ...] = ()
    remark: str = ""

    def apply(self, value: Any, source: Source) -> Settings:
        """Return our settings for a value; none where nothing is to be set.

        Raises:
            Untranslated: The value has no counterpart here.
        """
        if self.kind == "absent":
            raise Untranslated(self.note)
        if self.kind == "same" and self.only and shown(value).lower() not in self.only:
            raise Untranslated(f"esm2mega has {' or '.join(self.only)} alone: {self.note}")
        return {} if self.turn is None else self.turn(value, source)


def key(theirs: str, ours: str, convert: Callable[[Any], Any], note: str = "", remark: str = "") -> Rule:
    """Make the rule of keys whose value is that of one of ours, after a conversion that needs no other."""
    return Rule(
        tuple(theirs.split()), "key", (ours,), note, lambda value, _: {ours: convert(value)}, remark=remark
    )


def computed(theirs: str, ours: str, turn: Turn, note: str, remark: str = "") -> Rule:
    """Make the rule of keys from which, and maybe from others, several of ours are computed."""
    return Rule(tuple(theirs.split()), "key", tuple(ours.split()), note, turn, remark=remark)


def switch(settings: Settings) -> Turn:
    """Return the turn of a key that sets `settings` where it is true, and nothing where it is false."""
    return lambda value, _: dict(settings) if truth(value) else {}


def betas(first: str, second: str, defaults: tuple[float, float]) -> Turn:
    """Return the turn of either of two keys that hold the decay factors of Adam."""

    def turn(value: Any, source: Source) -> Settings:
        given = (source.number(first), source.number(second))
        return {
            "optim.betas": [x if x is not None else other for x, other in zip(given, defaults, strict=True)]
        }

    return turn


def elsewhere(theirs: str, note: str) -> Rule:
    """Make the rule of keys for what is done by a command, an option or a launcher, as `note` says."""
    return Rule(tuple(theirs.split()), "elsewhere", (), note)


def same(theirs: str, note: str, only: str = "") -> Rule:
    """Make the rule of keys that need nothing here: all values of them, or those of `only`."""
    return Rule(tuple(theirs.split()), "same", (), note, only=tuple(only.split()))


def absent(theirs: str, note: str) -> Rule:
    """Make the rule of keys that have no counterpart, with the reason."""
    return Rule(tuple(theirs.split()), "absent", (), note)


@dataclass(frozen=True)
class Habit:
    """Holds what a system did without a key for it, where our default is another.

    Attributes:
        ours: Our key.
        value: Its value that does the same.
        why: What that system did.
        when: Whether it holds in pretraining, in fine-tuning, or in both.
    """

    ours: str
    value: Any
    why: str
    when: Literal["pretraining", "finetuning", "both"] = "both"


def no_commands(source: Source) -> list[str]:
    """Return no commands: nothing has to be prepared."""
    return []


def no_change(settings: Settings, source: Source) -> list[str]:
    """Leave the settings as they are, and remark nothing."""
    return []


@dataclass(frozen=True)
class Table:
    """Holds the keys of one kind of file, or of the options of programs, of another system.

    Attributes:
        system: Name of the system.
        title: What the keys are the keys of.
        rules: The keys.
        habits: What it did without a key.
        programs: File names of the programs that have these keys as options.
        joint: What joins the words of an option.
        positional: Names of the words before the options of these programs.
        defaults: Values of keys that a file does not set, by program; under "" those of a file.
        aliases: Beginnings of keys that later versions wrote otherwise, with those of `rules`.
        hydra: Whether files name others, beside them, in `defaults`.
        processes: Keys whose product is the number of processes.
        prepare: Returns the commands that prepare the data.
        finish: Changes the settings as a whole, and returns remarks.
    """

    system: str
    title: str
    rules: tuple[Rule, ...]
    habits: tuple[Habit, ...] = ()
    programs: tuple[str, ...] = ()
    joint: str = "-"
    positional: tuple[str, ...] = ()
    defaults: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    hydra: bool = False
    processes: tuple[str, ...] = ()
    prepare: Callable[[Source], list[str]] = no_commands
    finish: Callable[[Settings, Source], list[str]] = no_change

    @property
    def are_options(self) -> bool:
        """Return whether the keys are written as options, with dashes."""
        return bool(self.programs) and not self.hydra

    def written(self, name: str) -> str:
        """Return a key of `rules` as users of that system write it."""
        is_option = self.are_options and name not in self.positional
        return f"--{name.replace('_', self.joint)}" if is_option else name

    def canonical(self, name: str) -> str:
        """Return the key of `rules` that a name means, which may be an option or that of another version."""
        if self.are_options:
            name = name.lstrip("-").replace("-", "_")
        for later, first in self.aliases:
            if name == later.rstrip(".") or (later.endswith(".") and name.startswith(later)):
                return first + name[len(later) :]
        return name

    def rule(self, name: str) -> Rule | None:
        """Return the rule for a key, by its whole name or else by the longest section that has one."""
        name = self.canonical(name)
        for rule in self.rules:
            if name in rule.theirs:
                return rule
        sections = [
            (len(theirs), rule)
            for rule in self.rules
            for theirs in rule.theirs
            if theirs.endswith(".*") and name.startswith(theirs[:-1])
        ]
        return max(sections, key=lambda found: found[0])[1] if sections else None
