"""Under many processes, one of them reports an error: the first to claim the right."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


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
