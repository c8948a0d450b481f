"""Padded batches, in which other packages take proteins, as packs and back."""

from __future__ import annotations

import torch
from torch import Tensor

from esm2mega.model.packed import PackedSequences


def pack(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, PackedSequences]:
    """Pack a padded batch, dropping the padding.

    Args:
        input_ids: int64 ``[b, s]``.
        attention_mask: ``[b, s]``, 1 = keep (the Hugging Face polarity). Padding may be on either side, not
            inside.

    Returns:
        Token ids ``[T]`` and the borders.

    Raises:
        ValueError: A row is empty or its kept tokens are not contiguous.
    """
    keep = attention_mask.bool()
    lengths = keep.sum(dim=1)
    if (lengths == 0).any():
        raise ValueError(
            f"row {int((lengths == 0).nonzero()[0])} of the batch has no token: attention_mask is all 0"
        )
    columns = torch.arange(keep.shape[1], device=keep.device)
    first = torch.where(keep, columns, keep.shape[1]).amin(dim=1)
    last = torch.where(keep, columns, -1).amax(dim=1)
    if (gaps := last - first + 1 != lengths).any():
        row = int(gaps.nonzero()[0])
        raise ValueError(
            f"row {row} of attention_mask has a gap: kept tokens must be contiguous, pad at the ends only"
        )
    return input_ids[keep], PackedSequences.from_lengths(lengths.tolist(), input_ids.device)


def unpack(values: Tensor, attention_mask: Tensor, fill: float = 0.0) -> Tensor:
    """Put per-token values of a pack back into the padded form: ``[T, ...] -> [b, s, ...]``.

    Args:
        values: One entry per kept token, in the order of `pack`.
        attention_mask: The mask given to `pack`.
        fill: Value at padding.
    """
    padded = values.new_full((*attention_mask.shape, *values.shape[1:]), fill)
    padded[attention_mask.bool()] = values
    return padded
