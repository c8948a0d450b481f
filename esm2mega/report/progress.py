"""Shows progress on stderr: on a terminal a bar with the time left, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_SECONDS = 10.0
"""Sets the shortest time between two plain lines, so that the log file of a long job stays readable."""


class Progress:
    """Counts units of work, and shows how far the work is.

    Usage:
        with Progress(1000, "pretrain", "step") as progress:
            progress.update(1, loss=2.9)
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "step",
        enabled: bool = True,
        initial: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        """Prepare without showing anything yet.

        Args:
            total: Number of units at the end; None if it is unknown.
            description: One or two words for the work.
            unit: Name of one unit, in the singular.
            enabled: False shows nothing, as on every rank but one.
            initial: Number of units that were done before, by the run that this one resumes; they do not
                count in the rate.
            stream: Where to write; None for stderr.
        """
        self.total, self.description, self.unit = total, description, unit
        self.enabled, self.initial, self.done = enabled, initial, initial
        self.fields: dict[str, Any] = {}
        self.stream = stream or sys.stderr
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._started = self._last_line = time.monotonic()
        self._shown: int | None = None

    def __enter__(self) -> Progress:
        """Show the bar or the first line."""
        self._started = time.monotonic()
        if not self.enabled:
            return self
        if self.stream.isatty():
            self._start_bar()
        else:
            self._line()
        return self

    def update(self, n: int = 1, **fields: Any) -> None:
        """Add `n` finished units; `fields` (loss=…, lr=…) are shown beside the count until replaced."""
        self.done += n
        self.fields.update(fields)
        if not self.enabled:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=n, fields=self._field_text(), rate=self._rate_text())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def message(self, text: str) -> None:
        """Write one line above the bar, or between the plain lines."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and self._shown != self.done:
            self._line()

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:,.0f}" + ("" if self.total is None else "/{task.total:,.0f}")),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}"),
            console=Console(file=self.stream),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(
            self.description, total=self.total, completed=self.done, fields="", rate=self._rate_text()
        )
        self._bar.start()

    def _rate(self) -> float:
        """Return the units per second since the start of this process, without those done before."""
        seconds = time.monotonic() - self._started
        return (self.done - self.initial) / seconds if seconds > 0 else 0.0

    def _rate_text(self) -> str:
        rate = self._rate()
        if rate == 0 or rate >= 1:
            return f"{rate:,.1f} {self.unit}/s" if rate < 100 else f"{rate:,.0f} {self.unit}/s"
        return f"{1 / rate:,.1f} s/{self.unit}"

    def _field_text(self) -> str:
        return " ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.fields.items()
        )

    def _line(self) -> None:
        parts = [f"{self.description}: {self.done:,}"]
        if self.total is not None:
            share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
            parts = [f"{self.description}: {self.unit} {self.done:,} of {self.total:,}{share}"]
        else:
            parts = [f"{self.description}: {self.unit} {self.done:,}"]
        rate = self._rate()
        if self.done > self.initial:
            parts.append(self._rate_text())
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        if self.fields:
            parts.append(self._field_text())
        print(", ".join(parts), file=self.stream, flush=True)
        self._last_line, self._shown = time.monotonic(), self.done


def show_bytes(stage: str, total: int) -> Progress:
    """Make a progress display that counts bytes; `prepare` opens one for each stage."""
    return Progress(total, stage, "byte")


def duration(seconds: float) -> str:
    """Write seconds as a person would say them: 42 s, 3 min 05 s, 2 h 10 min, 4 d 03 h."""
    whole = round(seconds)
    for size, unit, small, small_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit} {rest:02d} {small_unit}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"
