"""Tells when a run must save, so that it ends before `train.max_minutes`."""

from __future__ import annotations

import time
from collections.abc import Callable

_UNKNOWN_SAVE = 0.05
"""Is the part of the limit that is kept free for saving before the first checkpoint was timed …"""

_MOST_UNKNOWN = 120.0
"""… and this is the most of it, in seconds."""


class TimeLimit:
    """Foresees the end of `train.max_minutes`; only rank 0 has one, and tells the others.

    Kept free are the time that saving took last, and that of the longest stretch of work between two
    questions, which is a step.
    """

    def __init__(
        self, minutes: float, begun: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start to count.

        Args:
            minutes: `train.max_minutes`.
            begun: Reading of `clock` when the command began; None for now.
            clock: Seconds since any moment.
        """
        self._clock = clock
        self._asked = clock()
        self._end = (self._asked if begun is None else begun) + 60 * minutes
        self._step = 0.0
        self._saving_since: float | None = None
        self._save = min(_UNKNOWN_SAVE * 60 * minutes, _MOST_UNKNOWN)

    def go_on(self) -> None:
        """Leave out the time since the last question, in which there were no steps."""
        self._asked = self._clock()

    def is_near(self) -> bool:
        """Return whether one more step would leave too little time to save."""
        now = self._clock()
        self._step, self._asked = max(self._step, now - self._asked), now
        return now + self._step + self._save >= self._end

    def save_begins(self) -> None:
        """Begin to time the saving of a checkpoint, which may go on in the background."""
        self._saving_since = self._clock()

    def save_ends(self) -> None:
        """Note how long the saving took, if any is not noted yet."""
        if self._saving_since is not None:
            self._save, self._saving_since = self._clock() - self._saving_since, None
