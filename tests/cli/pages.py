"""Reads README and docs: their commands, their blocks of code and what stands in backticks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RUNS = ROOT / "docs" / "runs.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
MIGRATE = sorted((ROOT / "docs" / "migrate").glob("*.md"))
PAGES = [
    README,
    *DOCS,
    *MIGRATE,
    *TUTORIALS,
    ROOT / "tools" / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]
TEXT = {page: page.read_text() for page in PAGES}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language; a block without a language is of the language ''."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def spans(page: Path) -> list[str]:
    """Everything in single backticks outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@dataclass(frozen=True)
class Command:
    """A command of a bash block, on one line, and its words without leading variable assignments."""

    line: str

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return words

    @property
    def variables(self) -> list[str]:
        return re.findall(r"^[A-Z_]+(?==)|(?<= )[A-Z_]+(?==)", self.line.partition(" examples/")[0])


def commands(text: str) -> list[Command]:
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks(text, "bash"))).splitlines()
    return [Command(line) for line in lines if line.strip() and not line.startswith("#")]


# The commands of the tutorials are run, by tests/tutorials/test_tutorials.py.
COMMANDS = [(page, command) for page in PAGES if page not in TUTORIALS for command in commands(TEXT[page])]


def walk() -> list[Command]:
    """The README's way with one's own FASTA: the recipes up to those that prove, or need several machines."""
    section = re.search(r"^## Recipes$(.*?)^### Prove$", TEXT[README], re.MULTILINE | re.DOTALL)
    assert section is not None
    return commands(section.group(1))
