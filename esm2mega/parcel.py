"""Sends several tensors from the host to a device in one transfer, which the host does not wait for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Every tensor begins at a multiple of this many bytes, since views need those of their type, 8 at most."""


@dataclass(frozen=True)
class Parcel:
    """Holds copies of tensors back to back in one buffer of the host.

    Attributes:
        buffer: Their bytes, uint8; where there is a GPU in pinned memory, from which alone the host can start
            a copy and go on.
        starts: Where each tensor begins.
        forms: Data type and shape of each.
    """

    buffer: Tensor
    starts: tuple[int, ...]
    forms: tuple[tuple[torch.dtype, torch.Size], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Parcel:
        """Copy tensors of the host into a buffer."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        *starts, total = accumulate(sizes, initial=0)
        buffer = torch.empty(total, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        parcel = cls(buffer, tuple(starts), tuple((tensor.dtype, tensor.shape) for tensor in tensors))
        for place, tensor in zip(parcel._views(buffer), tensors, strict=True):
            place.copy_(tensor)
        return parcel

    def to(self, device: torch.device | str) -> list[Tensor]:
        """Return the tensors on `device`, where the work given to it from now on finds them."""
        return self._views(self.buffer.to(device, non_blocking=True))

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
            for start, (dtype, shape) in zip(self.starts, self.forms, strict=True)
        ]
