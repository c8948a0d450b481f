"""Under many processes, one of them reports an error: the first to claim the right. And what one of them does
alone succeeds or fails for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from esm2mega.errors import MachineError, UserError

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
    return MachineError(
        f"lost the connection to another process ({found[0]}): that one ended or hangs: its message is "
        "the one to read; without a message it was killed, most often for memory"
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


def on_one_rank(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on every rank; or the error that it raises. Broadcast over the world.

    Args:
        action: Called on rank 0 alone. Errors for the user and of the machine reach all ranks.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (UserError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
