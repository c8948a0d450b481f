"""One of many processes reports an error, and what one process does alone fails or succeeds for all.

The first process that claims the right reports.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from esm2mega.config.validate import world_size_from_environment
from esm2mega.errors import MachineError, UserError
from esm2mega.parallel import rendezvous

T = TypeVar("T")

# How gloo, NCCL and the rendezvous store word that the other side of a connection is gone.
_LOST = re.compile(
    r"Connection (reset|closed) by peer|Connection refused|Connection was likely closed|Broken pipe"
    r"|remote process exited|Timed out waiting \d+ ?ms"
)


def lost_peer(error: BaseException) -> MachineError | None:
    """The plain line for a collective that failed because another process is gone; None for other errors."""
    found = _LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    cure = ""
    if found[0].startswith("Timed out"):
        cure = "; if it is still at work, for instance on a large input, raise parallel.timeout_minutes"
    return MachineError(
        f"lost the connection to another process ({found[0]}): that one ended or hangs: its message is "
        f"the one to read; without a message it was killed, most often for memory{cure}"
    )


def claim_error_report() -> bool:
    """Whether this process is the first of the world to report an error.

    Every failing rank asks; the rendezvous store answers exactly one of them with True. When the store is
    gone (its host already left) nobody can be asked, and the process speaks for itself.
    """
    if not dist.is_initialized():
        return True
    try:
        return int(_get_default_store().add("esm2mega/error_reports", 1)) == 1
    except Exception:  # the store's host has left: a report too many is better than none
        return True


def on_one_rank(action: Callable[[], T], timeout: timedelta = rendezvous.TIMEOUT) -> T:
    """Give every rank what `action` gives on rank 0, or raise the error that it raises there.

    All ranks call this together. It is a broadcast over the world; before there are process groups it goes
    through the store where processes meet.

    Args:
        action: Called on rank 0 alone. Errors for the user and of the machine reach all ranks.
        timeout: Of the wait before there are process groups.

    Raises:
        MachineError: Another process ended, or did not come within `timeout`.
    """
    if rendezvous.is_alone() and not dist.is_initialized():
        return action()
    box: list[Any] = [None, None]
    if not dist.is_initialized():
        box = _through_store(action, timeout)
    else:
        if dist.get_rank() == 0:
            box = _attempt(action)
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _attempt(action: Callable[[], Any]) -> list[Any]:
    """The result, or the error that concerns all ranks."""
    try:
        return [action(), None]
    except (UserError, OSError) as error:
        return [None, error]


def _through_store(action: Callable[[], Any], timeout: timedelta) -> list[Any]:
    """`_attempt` of rank 0, on every rank. Rank 0 waits until all have it: the store may end with rank 0."""
    rank, world_size = int(os.environ["RANK"]), world_size_from_environment()
    with _meeting(timeout):
        store = rendezvous.meet(timeout)
        key = f"esm2mega/told_{rendezvous.next_number(store, 'told', rank)}"
    if rank == 0:
        defect = None
        try:
            box = _attempt(action)
        except Exception as error:
            defect = error
            box = [None, MachineError("rank 0 ended before it had begun: its message is the one to read")]
        with _meeting(timeout):
            store.set(key, pickle.dumps(box))  # type: ignore[arg-type]
            store.wait([f"{key}/all_have_it"])
        if defect is not None:
            raise defect
    else:
        with _meeting(timeout):
            # Written by rank 0 of this world, as what a broadcast of objects receives.
            box = pickle.loads(store.get(key))
            if store.add(f"{key}/have_it", 1) == world_size - 1:
                store.set(f"{key}/all_have_it", "")
    if box[1] is not None:
        # Said by the one rank where it happened.
        box[1].claimed_report = rank == 0
    return box


@contextmanager
def _meeting(timeout: timedelta) -> Iterator[None]:
    """Turn what the store raises about an absent process into the line for it."""
    try:
        yield
    except RuntimeError as error:
        # A store that never opens is an error of the network, not of the store.
        if isinstance(error, dist.DistStoreError) or "client socket has timed out" in str(error):
            raise _no_answer(timeout) from error
        if (lost := lost_peer(error)) is not None:
            raise lost from error
        raise


def _no_answer(timeout: timedelta) -> MachineError:
    minutes = timeout.total_seconds() / 60
    return MachineError(
        f"no answer from another process in {minutes:g} minutes: it ended or hangs: its message is the one "
        "to read"
    )
