"""Opens the key-value store through which the processes of a world meet before there are process groups."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from esm2mega.config.schema import ParallelConfig

TIMEOUT = timedelta(minutes=ParallelConfig().timeout_minutes)
"""Limits how long a process waits for the others if no configuration gives a time."""

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")

_met: tuple[list[str | None], Store] | None = None
"""Holds the address of this process in its world and the store, from `meet` until `leave`."""

_hosted: list[Store] = []
"""Keeps alive the stores that this process hosts: others may read from them, and they end unreferenced."""


def is_alone() -> bool:
    """Return whether this process is the only one, with or without a launcher."""
    return "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1"


def meet(timeout: timedelta = TIMEOUT) -> Store:
    """Connect to the store of this world: that of torchrun's agent, or else one that rank 0 hosts.

    Args:
        timeout: Longest wait of every operation on the store, and for processes that have not come yet.

    Raises:
        RuntimeError: The address cannot be reached.
    """
    global _met
    address = [os.environ.get(name) for name in _ADDRESS]
    if _met is None or _met[0] != address:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _hosted.append(store)
        _met = address, store
    _met[1].set_timeout(timeout)
    return _met[1]


def next_number(store: Store, what: str, rank: int) -> int:
    """Return how often this rank has asked for `what`, this time included; ranks in step get the same number.

    The store counts, so a process that outlives its world begins at 1 in the next one.
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
