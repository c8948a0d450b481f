"""Converts the saved state of one kind of optimizer into that of another: plain or distributed.

Megatron-Core's optimizers save the same moments under the same names, whole and split like the weights. They
differ in three ways: what the main weights are called, where the count of steps is, and how the values that
are not tensors are nested:

* `PLAIN` (fp32, fp64): no main weights, since they are the model's own; ``state.common_step``.
* `MIXED` (bf16, fp16): main weights ``optimizer.state.fp32_param``; the rest as plain, one level deeper.
* `DISTRIBUTED`: main weights ``optimizer.state.param`` in any precision; a step in each parameter group.

Fused Adams of other packages have a step in each parameter group in every form, see `place_count`.

The loss scale of fp16 is a value beside them, ``grad_scaler``, in `MIXED` and in `DISTRIBUTED`.

The second half of the module holds what Megatron-Core's distributed optimizer needs for saving and loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PLAIN, MIXED, DISTRIBUTED = "plain", "mixed", "distributed"
_NO_PARAMETER = "no parameter"

_MAIN = {MIXED: "optimizer.state.fp32_param.", DISTRIBUTED: "optimizer.state.param."}


def form_of_optimizer(optimizer: MegatronOptimizer) -> str:
    """Return the form of state that `optimizer` saves and loads."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    if isinstance(part, DistributedOptimizer):
        return DISTRIBUTED
    return MIXED if isinstance(part, Float16OptimizerWithFloat16Params) else PLAIN


def form_of_names(names: Iterable[str]) -> str:
    """Return the form of the optimizer's state in a checkpoint whose tensors have these names."""
    names = list(names)
    return next((form for form, main in _MAIN.items() if any(n.startswith(main) for n in names)), PLAIN)


def ignored(name: str, saved: str, own: str) -> bool:
    """Tell whether a tensor of a checkpoint is not read: main weights that equal the weights of the model."""
    return saved == DISTRIBUTED and own == PLAIN and name.startswith(_MAIN[DISTRIBUTED])


def ask_for(request: dict[str, Any], saved: str, own: str) -> None:
    """Change a request of an optimizer of form `own`, in place, to the tensors that form `saved` has."""
    if saved == own:
        return
    if own == DISTRIBUTED:
        for tensors in request["param_state"].values():
            main = tensors.pop("param")
            if saved == MIXED:
                tensors["param"] = _renamed(main, own, saved)
    elif own == MIXED and saved == DISTRIBUTED:
        groups = request["fp32_from_fp16_params"]
        request["fp32_from_fp16_params"] = [[_renamed(t, own, saved) for t in group] for group in groups]


def _renamed(tensor: ShardedTensor, own: str, saved: str) -> ShardedTensor:
    return replace(tensor, key=_MAIN[saved] + tensor.key.removeprefix(_MAIN[own]))


def translate(loaded: dict[str, Any], saved: str, own: str) -> dict[str, Any]:
    """Convert what was loaded from form `saved` after `ask_for` to the state that form `own` loads.

    Main weights that the checkpoint lacks are left out: they are the weights of the model.
    """
    if DISTRIBUTED not in (saved, own) or saved == own:
        return loaded
    if own == DISTRIBUTED:
        values = loaded["optimizer"] if saved == MIXED else loaded
        # A count of zero is not in the file.
        step = values.get("state", {}).get("common_step")
        count = {} if step is None else {"step": float(step)}
        return {
            **{name: loaded[name] for name in ("grad_scaler",) if name in loaded},
            "optimizer": {
                "param_groups": [{"step": 0.0, **group, **count} for group in values["param_groups"]]
            },
            "param_state": loaded["param_state"],
            "param_state_sharding_type": "fully_reshardable",
        }
    groups = loaded["optimizer"]["param_groups"]
    inner = loaded["optimizer"] if own == MIXED else loaded
    # The optimizer knows which parameters a group holds, the checkpoint does not; for `MIXED`, loading has
    # merged the two already.
    held = [group["params"] for group in inner["param_groups"]]
    state = inner["state"]
    steps = [group.pop("step") for group in groups if "step" in group]
    if steps:
        state["common_step"] = torch.tensor(steps[0], dtype=torch.float32)
    plain = {
        "state": state,
        "param_groups": [{**group, "params": own} for group, own in zip(groups, held, strict=True)],
    }
    return {**loaded, "optimizer": plain} if own == MIXED else plain


def distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the distributed optimizers within `optimizer`; a plain one contains none."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


@contextmanager
def places_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Correct, during a save, the places of parameters in the gathered state, which has no padding.

    A buffer of gradients is made of buckets, each padded so that it divides among the data-parallel
    processes, and the tied embedding of a pipeline has a bucket of its own. Gathering leaves the padding out,
    but Megatron-Core 0.16.1 and 0.19.2 then cut the parameters out at their places in the padded buffer:
    every parameter behind the first bucket would be saved shifted by the padding before it (Megatron-LM pull
    request 5077).
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
    # A Megatron-Core with the repair no longer pads what would lie beyond the end of the gathered state.
    return "pad" in type(part).sharded_param_state_fully_reshardable.__code__.co_names


def begin_states(optimizer: MegatronOptimizer) -> None:
    """Make the moments that optimizers make in their first step, for parameters without an update so far.

    A checkpoint holds them all, also one of a run whose steps were skipped so far.

    A distributed optimizer of few parameters leaves some ranks nothing but padding. Megatron-Core asks the
    states of PyTorch's Adam for their step count on every rank, so such a rank gets a state of no parameter,
    which holds only the count. All ranks call this together.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for parameter in part.get_parameters():
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            if isinstance(part, DistributedOptimizer):
                _count_everywhere(part)
        elif part.optimizer is not None:  # none where all weights are frozen
            part.init_state_fn(part.optimizer, part.config)


def _count_everywhere(part: DistributedOptimizer) -> None:
    """Give a rank without parameters the step count that the other ranks have."""
    counts = [state["step"] for key, state in part.optimizer.state.items() if key != _NO_PARAMETER]
    count = torch.zeros((), device=part.buffers[0].grad_data.device)
    if counts:
        count.copy_(counts[0])
    # Over the data-parallel group, among which the parameters are divided; every rank holds the result.
    dist.all_reduce(count, dist.ReduceOp.MAX, part.data_parallel_group)
    if not counts:
        part.optimizer.state[_NO_PARAMETER] = {"step": count}


def make_loadable(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimizer load into PyTorch's Adam, whose step count is among the tensors.

    Two places in Megatron-Core assume the fused Adam of apex or of Transformer Engine, which keep the step
    count elsewhere: it is read from a state that does not exist before the first step of PyTorch's Adam, and
    it is expected among the loaded tensors, where it is not. Main weights that were not loaded stay as they
    are.
    """
    begin_states(optimizer)
    for part in distributed_parts(optimizer):
        part._set_main_param_and_optimizer_states = partial(
            _set_states, part, type(part)._set_main_param_and_optimizer_states
        )


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a step count of its own after loading, which gave all of them the same tensor."""
    for part in distributed_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()


def place_count(loaded: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Enter the count of steps where it is loaded from for PyTorch's Adam, which keeps it beside its moments.

    The fused Adams of Transformer Engine and apex, with which others may have trained, keep it in the groups
    of parameters. Megatron-Core does not save a count of zero, that of a training whose steps were all
    skipped.

    Args:
        loaded: A state of the form of `optimizer`, which is changed.
        optimizer: The optimizer that it is for.
    """
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    if not isinstance(part.optimizer, torch.optim.AdamW):  # of nothing, where all weights are frozen
        return
    inner = loaded if form_of_optimizer(optimizer) == PLAIN else loaded["optimizer"]
    # Groups without parameters have none; the others agree.
    counts = [group.pop("step") for group in inner["param_groups"] if "step" in group]
    count = float(max(counts, default=0))
    if isinstance(part, DistributedOptimizer):
        for group in inner["param_groups"]:
            group["step"] = count
    else:
        inner["state"].setdefault("common_step", torch.tensor(count, dtype=torch.float32))


def count_in_whole_steps(state: dict[str, Any]) -> None:
    """Make the count in the groups of a distributed optimizer's state an integer, as fused Adams need it."""
    for group in state.get("optimizer", {}).get("param_groups", []):
        if "step" in group:
            group["step"] = int(group["step"])


def _set_states(
    part: Any, original: Callable[..., None], model_parameter: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> None:
    original(part, model_parameter, {**part._get_main_param_and_optimizer_states(model_parameter), **tensors})
