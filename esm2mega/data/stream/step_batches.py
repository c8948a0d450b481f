"""Holds the micro-batches of a step, which are taken from the stream one by one while the step runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

BatchT = TypeVar("BatchT")


class StepBatches(Sequence[BatchT]):
    """Takes each of its batches from their source when it is first asked for, and keeps it."""

    def __init__(self, source: Iterator[BatchT], count: int) -> None:
        """Take nothing yet.

        Args:
            source: Gives at least `count` batches; nothing else takes from it until this has all of them.
            count: Their number.
        """
        self._source, self._count = source, count
        self._taken: list[BatchT] = []

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> BatchT: ...
    @overload
    def __getitem__(self, place: slice) -> list[BatchT]: ...
    def __getitem__(self, place: int | slice) -> BatchT | list[BatchT]:
        """Return a batch or several, after taking those before it."""
        places = range(self._count)[place]
        last = places if isinstance(places, int) else max(places, default=-1)
        while len(self._taken) <= last:
            self._taken.append(next(self._source))
        return self._taken[places] if isinstance(places, int) else [self._taken[i] for i in places]
