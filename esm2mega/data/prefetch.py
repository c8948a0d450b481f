"""Runs an iterator one item ahead of its consumer, in a daemon thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `items` and builds the next one while the consumer works on the last.

    An exception inside `items` is raised by the `next` that would have returned that item.
    """

    def __init__(self, items: Iterator[T]) -> None:
        """Starts the thread and with it the first item."""
        self._items = items
        self._ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(1)  # how many items the thread may still build
        self._closed = False
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._run, name="esm2mega-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._end is None:
            item = self._ready.get()
            if not isinstance(item, _End):
                self._wanted.release()
                return item
            self._end = item
        raise self._end.error

    def close(self) -> None:
        """Stops the thread and waits until the item it is building is done; may be called twice."""
        self._closed = True
        self._end = self._end or _End(StopIteration())
        self._wanted.release()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closed:
                return
            try:
                self._ready.put(next(self._items))
            except BaseException as error:  # whatever it is belongs to the consumer, StopIteration included
                self._ready.put(_End(error))
                return


class _End:
    """What the consumer gets to raise in place of an item."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
