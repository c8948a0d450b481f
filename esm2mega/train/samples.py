"""Names the samples that a step has used, for the log (`logging.samples`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from esm2mega.train.step import Batch


def samples_of_step(batches: Sequence[Batch]) -> list[list[int]]:
    """Gather over the data-parallel group which samples the micro-batches of a step hold.

    The names come from the batches that the model got, not from the plan of the packs. All ranks call this
    together, and all get the result.

    Args:
        batches: This rank's micro-batches of the step.

    Returns:
        The number of the sample and of the first token of each piece, in the order of the packs, which is
        the same at every layout.
    """
    group = parallel_state.get_data_parallel_group()
    shares: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shares, [(batch.pack, batch.samples) for batch in batches], group=group)
    packs = sorted((pack for share in shares for pack in share), key=lambda pack: pack[0])
    return [list(piece) for _, samples in packs for piece in samples]
