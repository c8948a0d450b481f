"""The table of traps in the documentation names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_trap_has_a_test() -> None:
    page = (ROOT / "docs" / "converters.md").read_text()
    rows = re.findall(r"^\| (\d+)\. (.*)$", page.partition("## Traps")[2], re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 21))
    for number, row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, f"trap {number} names no test"
        for path, name in tests:
            assert f"\ndef {name}(" in (ROOT / path).read_text(), f"trap {number}: {path} has no {name}"
