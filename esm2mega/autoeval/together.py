"""Lets rank 0 work alone for as long as it takes, while the other ranks of a suite wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from esm2mega.parallel.errors import on_one_rank

T = TypeVar("T")

_AS_LONG_AS_IT_TAKES = timedelta(days=30)
"""Limits the wait for rank 0; a launcher ends the ranks that wait for one that has ended."""

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def alone(action: Callable[[], T]) -> T:
    """Return on every rank what `action` returns on rank 0, or raise the error that it raises there.

    All ranks call this together, outside of process groups; it is a broadcast through the rendezvous store.
    What `action` calls takes rank 0 for the only process, so that it may call what ranks call together.
    """

    def act() -> T:
        with _only_process():
            return action()

    return on_one_rank(act, _AS_LONG_AS_IT_TAKES)


@contextmanager
def _only_process() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _OF_RANKS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
