"""Reads the journal with which a harness goes on: a JSON object in each line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the entries; what stands behind the last end of a line was cut short, and is removed."""
    lines = path.read_text().split("\n") if path.exists() else []
    if lines and lines.pop():
        path.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]
