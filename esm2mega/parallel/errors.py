"""Lets one of many processes report an error, and shares the result or error of what rank 0 does alone.

The process that reports is the first one that asks to.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

from esm2mega.config.launcher import world_size_from_environment
from esm2mega.errors import MachineError, UserError
from esm2mega.parallel import rendezvous

T = TypeVar("T")


class _FailedRankError(MachineError):
    """Tells the other ranks that one of them met an error which is no fault of input or machine."""

    claimed_report: bool | None = None


# Phrases by which gloo, NCCL and the rendezvous store say that the other side of a connection is gone.
_LOST = re.compile(
    r"Connection (reset|closed) by peer|Connection refused|Connection was likely closed|Broken pipe"
    r"|Connection timed out|No route to host|remote process exited|Timed out waiting \d+ ?ms"
    r"|Timed out initializing process group"
)


def lost_peer(error: BaseException) -> MachineError | None:
    """Return a plain error for a collective that failed because another process is gone, else None."""
    found = _LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    cure = ""
    if found[0].startswith("Timed out"):
        cure = "; if it is still at work, for instance on a large input, raise parallel.timeout_minutes"
    return MachineError(
        f"lost the connection to another process ({found[0]}), which ended or hangs; read its message: if it "
        f"has none, it was killed, most often for lack of memory{cure}"
    )


def no_answer(timeout: timedelta, ranks: Sequence[int] = ()) -> MachineError:
    """Return the error for processes that did not come within `timeout`, by their ranks if known."""
    minutes = timeout.total_seconds() / 60
    numbers = ", ".join(map(str, ranks))
    who = f"rank{'s' * (len(ranks) > 1)} {numbers}" if ranks else "another process"
    at_work = "; if it is still at work, for instance on a large input, raise parallel.timeout_minutes"
    return MachineError(
        f"no answer from {who} in {minutes:g} minutes: it ended or hangs; read its message"
        f"{at_work if ranks else ''}"
    )


def claim_error_report() -> bool:
    """Return whether this process is the first of the world to report an error.

    Every failing rank asks; the rendezvous store answers exactly one of them with True. If the store is gone
    because its host has already left, the answer is True as well.
    """
    if not dist.is_initialized():
        return True
    try:
        return int(_get_default_store().add("esm2mega/error_reports", 1)) == 1
    except Exception:  # the store's host has left: a report too many is better than none
        return True


def on_one_rank(action: Callable[[], T], timeout: timedelta = rendezvous.TIMEOUT) -> T:
    """Return on every rank what `action` returns on rank 0, or raise the error that it raises there.

    All ranks call this together. It is a broadcast over the world; before there are process groups it goes
    through the rendezvous store.

    Args:
        action: Called on rank 0 alone. Its UserError, MachineError or OSError is raised on all ranks.
        timeout: Longest wait for other ranks if there are no process groups yet.

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


def first_error(
    action: Callable[[int, int], None], timeout: timedelta = rendezvous.TIMEOUT
) -> Exception | None:
    """Let every rank do its share of some work, and return on all of them the first error that any met.

    All ranks call this together. It is an all-gather over the world; before there are process groups it goes
    through the rendezvous store.

    Args:
        action: Called on every rank with the rank and the number of ranks. Its UserError, MachineError or
            OSError is returned, of several that of the lowest rank; any other error ends all ranks.
        timeout: As for `on_one_rank`.

    Raises:
        MachineError: Another process ended, or did not come within `timeout`.
    """
    if dist.is_initialized():
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, _attempt(lambda: action(dist.get_rank(), len(errors)))[1])
        return _first(errors)
    if rendezvous.is_alone():
        return _attempt(lambda: action(0, 1))[1]
    rank, world_size = int(os.environ["RANK"]), world_size_from_environment()
    with meeting(timeout):
        store = rendezvous.meet(timeout)
        key = f"esm2mega/share_{rendezvous.next_number(store, 'share', rank)}"
    defect: Exception | None = None
    try:
        own = _attempt(lambda: action(rank, world_size))[1]
    except Exception as error:
        # The others wait for this rank.
        defect, own = error, _FailedRankError(f"rank {rank} failed before the run began; read its message")
    with meeting(timeout):
        store.set(f"{key}/{rank}", pickle.dumps(own))  # type: ignore[arg-type]

    def absent() -> list[int]:
        return [other for other in range(world_size) if not store.check([f"{key}/{other}"])]

    def gathered() -> Exception | None:
        # The ranks of this world wrote them, as in `_through_store`.
        with meeting(timeout, absent):
            errors = [pickle.loads(store.get(f"{key}/{other}")) for other in range(world_size)]
        if (failed := next((error for error in errors if type(error) is _FailedRankError), None)) is not None:
            raise failed
        return _first(errors)

    try:
        return on_one_rank(gathered, timeout)
    except _FailedRankError as failed:
        # The rank where it happened reports it.
        failed.claimed_report = False
        raise failed if defect is None else defect from None


def _first(errors: Sequence[Exception | None]) -> Exception | None:
    return next((error for error in errors if error is not None), None)


def _attempt(action: Callable[[], Any]) -> list[Any]:
    """Return the result and None, or None and the error that is raised on all ranks."""
    try:
        return [action(), None]
    except (UserError, OSError) as error:
        return [None, error]


def _through_store(action: Callable[[], Any], timeout: timedelta) -> list[Any]:
    """Return rank 0's `_attempt` on every rank; rank 0, which may host the store, waits until all have it."""
    rank, world_size = int(os.environ["RANK"]), world_size_from_environment()
    with meeting(timeout):
        store = rendezvous.meet(timeout)
        key = f"esm2mega/told_{rendezvous.next_number(store, 'told', rank)}"
    if rank == 0:
        defect = None
        try:
            box = _attempt(action)
        except Exception as error:
            defect = error
            box = [None, MachineError("rank 0 failed before the run began; read its message")]
        with meeting(timeout, lambda: missing(store, key, range(1, world_size))):
            store.set(key, pickle.dumps(box))  # type: ignore[arg-type]
            store.wait([f"{key}/all_have_it"])
        if defect is not None:
            raise defect
    else:
        with meeting(timeout, lambda: [0]):
            # Rank 0 of this world wrote it: as trustworthy as what a broadcast of objects receives.
            box = pickle.loads(store.get(key))
            come(store, key, rank)
            if store.add(f"{key}/have_it", 1) == world_size - 1:
                store.set(f"{key}/all_have_it", "")
    if box[1] is not None:
        # The rank where it happened reports it.
        box[1].claimed_report = rank == 0
    return box


def come(store: Store, meeting: str, rank: int) -> None:
    """Say that this rank has come to a meeting, see `missing`."""
    store.set(f"{meeting}/rank_{rank}", "")


def missing(store: Store, meeting: str, ranks: Iterable[int]) -> list[int]:
    """Return which of the ranks have not come to a meeting."""
    return [rank for rank in ranks if not store.check([f"{meeting}/rank_{rank}"])]


@contextmanager
def meeting(timeout: timedelta, absent: Callable[[], Sequence[int]] = lambda: ()) -> Iterator[None]:
    """Turn what the store raises about an absent process into a `MachineError`.

    Args:
        timeout: How long the store waits.
        absent: Finds out which ranks did not come.
    """
    try:
        yield
    except RuntimeError as error:
        # A store that never opens is an error of the network, not of the store.
        if isinstance(error, dist.DistStoreError) or "client socket has timed out" in str(error):
            raise no_answer(timeout, absent()) from error
        if (lost := lost_peer(error)) is not None:
            raise lost from error
        raise
