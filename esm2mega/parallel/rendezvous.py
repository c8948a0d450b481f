"""Opens the key-value store through which the processes of a world meet before there are process groups."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from esm2mega.config.schema import ParallelConfig
from esm2mega.errors import UserError

TIMEOUT = timedelta(minutes=ParallelConfig().timeout_minutes)
"""Limits how long a process waits for the others if no configuration gives a time."""

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")

_met: tuple[list[str | None], Store] | None = None
"""Holds the address of this process in its world and the store, from `meet` until `leave`."""

_hosted: Store | None = None
"""The store that this process, as rank 0, hosts for the others.

A store ends with its last reference. Other ranks may still read from it after `leave`, so it is kept until
the processes of the next world have met, who are then done with it.
"""


def is_alone() -> bool:
    """Return whether this process is the only one, with or without a launcher."""
    return "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1"


def meet(timeout: timedelta = TIMEOUT) -> Store:
    """Connect to the store of this world: that of torchrun's agent, or else one that rank 0 hosts.

    Args:
        timeout: Longest wait of every operation on the store, and for processes that have not come yet.

    Raises:
        UserError: The address is not in the environment, or another process uses the port.
        RuntimeError: It cannot be reached.
    """
    global _hosted, _met
    if missing := [name for name in _ADDRESS if not os.environ.get(name)]:
        raise UserError(
            f"RANK={os.environ.get('RANK')} is set, as for one of several processes, but not "
            f"{' or '.join(missing)}; start with torchrun, which sets all of them, or unset RANK"
        )
    address = [os.environ.get(name) for name in _ADDRESS]
    if _met is None or _met[0] != address:
        try:
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"MASTER_PORT={os.environ['MASTER_PORT']}: another process of this host uses it; set "
                "MASTER_PORT to another port, the same for all processes"
            ) from error
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _hosted = store
        _met = address, store
    _met[1].set_timeout(timeout)
    return _met[1]


def next_number(store: Store, what: str, rank: int) -> int:
    """Count this rank's calls for `what`, and return the number of this one, from 1.

    Ranks that make the same calls in the same order get the same numbers, so a number names one meeting. The
    count is kept in the store, not in the process: it starts anew in a world with another store.
    """
    return int(store.add(f"esm2mega/{what}/of_rank_{rank}", 1))


def store_of_groups(timeout: timedelta) -> tuple[Store, int, int]:
    """Return a store for new process groups, this process's rank, and the number of processes.

    Without a launcher the store is in memory, for a world of one process: no port is opened.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank = meet(timeout), int(os.environ["RANK"])
    # Process groups write the same keys every time.
    prefix = f"esm2mega/groups_{next_number(store, 'groups', rank)}"
    return PrefixStore(prefix, store), rank, int(os.environ["WORLD_SIZE"])


def leave() -> None:
    """Release the store; the next `meet` connects again."""
    global _met
    _met = None
