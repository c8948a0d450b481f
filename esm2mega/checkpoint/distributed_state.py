"""What Megatron-Core's distributed optimizer needs around saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers within `optimizer`; none where it is a plain one."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


@contextmanager
def places_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While saving: let parameters be found in the gathered state, which has no padding between buckets.

    A buffer of gradients is made of buckets, each padded so that it divides among the data-parallel
    processes, and the tied embedding of a pipeline has a bucket of its own. Gathering leaves the padding
    out, but Megatron-Core 0.16.1 and 0.19.2 then cut the parameters out at their places in the padded
    buffer: every parameter behind the first bucket would be saved shifted by the padding before it
    (Megatron-LM pull request 5077).
    """
    with ExitStack() as stack:
        for part in filter(_cuts_at_padded_places, distributed_parts(optimizer)):
            for buffer in part.buffers:
                padding = [0]
                for bucket in buffer.buckets:
                    padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
                places = {
                    parameter: (start - padding[bucket], end - padding[bucket], bucket)
                    for parameter, (start, end, bucket) in buffer.param_index_map.items()
                }
                stack.enter_context(patch.object(buffer, "param_index_map", places))
        yield


def _cuts_at_padded_places(part: Any) -> bool:
    # The same code fills up what then lies beyond the end of the gathered state, which the repair removed.
    return "pad" in type(part).sharded_param_state_fully_reshardable.__code__.co_names


def make_loadable(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimizer load into PyTorch's Adam, whose step count is among the tensors.

    Two places assume the fused Adams of apex or Transformer Engine, which do not: the step count is read from
    a state that does not exist before the first step, and the count is expected among the loaded tensors,
    where it is not. Main weights that were not loaded stay as they are.
    """
    for part in _with_torch_adam(optimizer):
        for parameter in part.get_parameters():
            state = part.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
    for part in distributed_parts(optimizer):
        part._set_main_param_and_optimizer_states = partial(
            _set_states, part, type(part)._set_main_param_and_optimizer_states
        )


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """After loading: give every parameter a step count of its own, where all were given the same tensor."""
    for part in _with_torch_adam(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _set_states(
    part: Any, original: Callable[..., None], model_parameter: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> None:
    original(part, model_parameter, {**part._get_main_param_and_optimizer_states(model_parameter), **tensors})


def _with_torch_adam(optimizer: MegatronOptimizer) -> list[Any]:
    return [p for p in distributed_parts(optimizer) if isinstance(p.optimizer, torch.optim.AdamW)]
