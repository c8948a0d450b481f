"""Defines `Setting`, one value on its way into the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Holds a value as it was read, its dotted key, and where it was written, as file:line."""

    key: str
    value: Any
    where: str
