"""The pages on moving over: the keys are those of the tables, links and commands of the index exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from tests.cli.pages import blocks, commands
from tests.cli.test_page_commands import check

DOCS = Path(__file__).parents[2] / "docs"
INDEX = DOCS / "migrate" / "README.md"


def test_the_page_of_keys_is_what_the_tables_say() -> None:
    generator = runpy.run_path(str(DOCS / "migration_keys.py"))
    assert generator["PAGE"].read_text() == generator["page"](), "run make migration-keys"


def test_the_index_links_every_page_and_names_commands_that_exist() -> None:
    text = INDEX.read_text()
    pages = {path.name for path in INDEX.parent.glob("*.md")} - {INDEX.name}
    linked = re.findall(r"\]\(([^)#\s]+)", text)
    assert pages <= set(linked)
    for link in linked:
        ours = link.partition("/")[0] != "examples" and "migrate" not in link and "/" in link
        assert not ours or (INDEX.parent / link).exists(), link
    found = commands(text)
    assert len(found) == 2
    for command in found:
        check(command)
    assert blocks(text, "") == [
        "unknown key trainer.max_steps, which is one of BioNeMo 1: write train.max_steps=100\n"
    ]
