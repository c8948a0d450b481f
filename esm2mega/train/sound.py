"""Tells whether a training is in a state that can be saved as a good one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from esm2mega.parallel.initialize import Ranks
from esm2mega.train.evaluate import evaluate
from esm2mega.train.step import Batch, TrainState


def is_sound(state: TrainState, probe: Sequence[Batch], ranks: Ranks) -> bool:
    """Return whether trained weights, optimizer and the loss that the weights give are all finite.

    An update can leave weights that are finite and so large that the next loss is not. All ranks call this
    together and get the same answer; it costs the host one synchronisation, or two with `probe`.

    Args:
        state: Model, optimizer and loss.
        probe: Micro-batches of this rank to compute the loss of, equally many on every data-parallel rank,
            none for a loss that is known to be finite.
        ranks: Where this process stands.
    """
    if not all_finite(state.model, state.optimizer, ranks.device):
        return False
    if not probe:
        return True
    metrics = evaluate(state.model, state.loss, probe, ranks)
    assert metrics is not None
    return metrics["loss"] is None or math.isfinite(metrics["loss"])


@torch.no_grad()
def all_finite(model: Sequence[Any], optimizer: MegatronOptimizer, device: torch.device) -> bool:
    """Return whether all trained weights and all states of their optimizer are finite, on every rank."""
    alike: defaultdict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in (*_trained(model), *_held_by(optimizer)):
        if tensor.is_floating_point() and tensor.numel():
            alike[tensor.dtype, tensor.device].append(tensor)
    is_bad = torch.zeros(1, device=device)
    for tensors in alike.values():
        # The largest magnitudes; NaN among them stays NaN.
        largest = torch.stack(torch._foreach_norm(tensors, math.inf))
        is_bad += (~torch.isfinite(largest)).any().to(device)
    # Over the world: each rank holds a part of the model, and perhaps of the optimizer.
    dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
    return not is_bad.item()


def _trained(model: Sequence[Any]) -> Iterator[Tensor]:
    for chunk in model:
        yield from (parameter.detach() for parameter in chunk.parameters() if parameter.requires_grad)


def _held_by(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield the moments and, where weights are not updated themselves, their copies in higher precision."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from (parameter.detach() for parameter in part.get_parameters())
        for moments in getattr(part.optimizer, "state", {}).values():
            yield from (moment for moment in moments.values() if isinstance(moment, Tensor))
