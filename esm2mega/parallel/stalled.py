"""Finds out which ranks no longer answer, once waiting for them has timed out.

Every rank that fails because of another one comes to the rendezvous store and says so. Those that do not
come within a few seconds are stopped, hang, or are at work on something else.
"""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta

from torch.distributed import Store

_MOST_GRACE = timedelta(seconds=10)
"""Ranks that wait for the same one time out at about the same time; this is how far apart they may be."""


def absent_ranks(store: Store, rank: int, world_size: int, is_timeout: bool, timeout: timedelta) -> list[int]:
    """Say that this rank has failed, and return the ranks that do not say so.

    Args:
        store: Store of the world.
        rank: This rank.
        world_size: Number of ranks.
        is_timeout: Whether this rank has waited in vain; if not, it only says that it is there.
        timeout: How long the world waits for a rank. The wait for the others here is a small part of it.

    Returns:
        The ranks that did not come, ascending; rank 0 if the store, which it hosts, does not answer.
    """
    grace = min(_MOST_GRACE, timeout / 4).total_seconds()
    absent: list[int] = []

    def ask() -> None:
        # A host that has ended is no reason for a second error.
        with contextlib.suppress(Exception):
            store.set(_key(rank), "")
            deadline = time.monotonic() + grace
            others = [other for other in range(world_size) if other != rank]
            while is_timeout and (others := [r for r in others if not store.check([_key(r)])]):
                if time.monotonic() > deadline:
                    absent.extend(others)
                    break
                time.sleep(0.1)

    # In a thread, since a store whose host is stopped blocks for ever. It ends with the process.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * grace)
    return [0] if asking.is_alive() else absent


def _key(rank: int) -> str:
    return f"esm2mega/failed/rank_{rank}"
