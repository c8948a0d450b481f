"""Copies numbers of a device to the host without waiting for the work that they come from."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Is a small tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Begin to copy, behind the work that the device has been given so far."""
        self._event: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.is_cuda:
            # Only for pinned memory can the host start a copy and go on.
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        """Return the numbers, flattened, once they have come."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.flatten().tolist()
