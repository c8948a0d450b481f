"""Defines a line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass

OK, MISSING, WARNING, FAILED = "ok", "missing", "warning", "FAILED"


@dataclass(frozen=True)
class Finding:
    """Holds a line of the report.

    Attributes:
        state: `MISSING` is optional and only noted, `WARNING` works and may trouble a long run, `FAILED`
            makes the machine unfit.
        what: What was tried, and what came of it.
        cure: What to do about it.
    """

    state: str
    what: str
    cure: str = ""

    def __str__(self) -> str:
        """Return the line as it is printed."""
        return f"{self.state:<8} {self.what}" + (f"; {self.cure}" if self.cure else "")
