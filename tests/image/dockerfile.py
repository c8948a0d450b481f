"""Reads a Dockerfile as far as ours go, and refuses what it does not know rather than passing over it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class NotUnderstoodError(ValueError):
    """The file has something that this reader does not know."""


@dataclass(frozen=True)
class Instruction:
    """A line of the file with its continuation lines."""

    word: str
    rest: str
    line: int


@dataclass(frozen=True)
class Step:
    """What changes the root: a RUN with its shell command, or a COPY with its words."""

    word: str
    text: str
    environment: Mapping[str, str]
    workdir: str
    user: str


@dataclass
class Image:
    """An image as the file describes it: how it is made, and how a container of it starts."""

    base: str = ""
    steps: list[Step] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    healthcheck: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def instructions(text: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile, with comments left out and continued lines joined."""
    found: list[Instruction] = []
    begun, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or (not line.strip() and not begun):
            continue
        first = first or number
        begun += line
        if begun.endswith("\\"):
            begun = begun[:-1]
            continue
        word, _, rest = begun.strip().partition(" ")
        found.append(Instruction(word.upper(), rest.strip(), first))
        begun, first = "", 0
    return found


def read(path: Path, arguments: Mapping[str, str] | None = None) -> Image:
    """Read a Dockerfile of one stage.

    Args:
        path: The file.
        arguments: Values for its ARGs, as of ``docker build --build-arg``.

    Raises:
        NotUnderstoodError: Something in it is not known here, or an argument is not one of its ARGs.
    """
    image, given, args = Image(), dict(arguments or {}), {}
    for each in instructions(path.read_text(encoding="utf-8")):
        try:
            if each.word == "ARG":
                name, _, default = each.rest.partition("=")
                args[name] = given.get(name, _expand(_unquoted(default), args))
            elif each.word == "FROM":
                image.base = _expand(each.rest, args)
                before, args = args, {}
            else:
                _apply(image, each, args)
        except (ValueError, KeyError) as error:
            raise NotUnderstoodError(f"{path}:{each.line}: {each.word}: {error}") from error
    if unknown := set(given) - set(args) - set(before):
        raise NotUnderstoodError(f"{path}: it has no ARG {', '.join(sorted(unknown))}")
    return image


def _apply(image: Image, each: Instruction, args: Mapping[str, str]) -> None:
    # An ENV hides an ARG of the same name, as in Docker.
    variables = {**args, **image.environment}
    if each.word == "ENV":
        for pair in shlex.split(each.rest):
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError("written without =")
            image.environment[name] = _expand(value, variables)
    elif each.word == "WORKDIR":
        image.workdir = _expand(each.rest, variables)
    elif each.word == "USER":
        image.user = _expand(each.rest, variables)
    elif each.word in ("RUN", "COPY"):
        if each.rest.startswith(("[", "--", "<<")):
            raise ValueError("only the plain form is known")
        text = each.rest if each.word == "RUN" else _expand(each.rest, variables)
        image.steps.append(Step(each.word, text, variables, image.workdir, image.user))
    elif each.word == "HEALTHCHECK":
        image.healthcheck = _exec_form(each.rest[each.rest.index("CMD") + len("CMD") :])
    elif each.word == "CMD":
        image.command = _exec_form(each.rest)
    else:
        raise ValueError("not known here")


def _exec_form(text: str) -> list[str]:
    words = json.loads(text)
    if not isinstance(words, list):
        raise ValueError("only a list of words is known")
    return words


def _unquoted(text: str) -> str:
    return "".join(shlex.split(text))


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace ``${NAME}`` and ``$NAME``; a name without a value is an error, where Docker takes ''."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables[found[1] or found[2]], text)
