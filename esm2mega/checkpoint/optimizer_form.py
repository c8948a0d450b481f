"""One form of the saved optimizer for another: a resume may switch the distributed optimizer on or off.

Megatron-Core's optimizers save the same moments under the same names, whole and split like the weights. They
differ in three ways: what the main weights are called, where the count of steps is, and how the values that
are no tensors are nested:

* `PLAIN` (fp32, fp64): no main weights, since they are the model's own; ``state.common_step``.
* `MIXED` (bf16): main weights ``optimizer.state.fp32_param``; the rest as plain, one level deeper.
* `DISTRIBUTED`: main weights ``optimizer.state.param`` in any precision; a step in each parameter group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PLAIN, MIXED, DISTRIBUTED = "plain", "mixed", "distributed"

_MAIN = {MIXED: "optimizer.state.fp32_param.", DISTRIBUTED: "optimizer.state.param."}


def form_of_optimizer(optimizer: MegatronOptimizer) -> str:
    """The form that `optimizer` saves and loads."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    if isinstance(part, DistributedOptimizer):
        return DISTRIBUTED
    return MIXED if isinstance(part, Float16OptimizerWithFloat16Params) else PLAIN


def form_of_names(names: Iterable[str]) -> str:
    """The form of a checkpoint with these tensors."""
    names = list(names)
    return next((form for form, main in _MAIN.items() if any(n.startswith(main) for n in names)), PLAIN)


def ignored(name: str, saved: str, own: str) -> bool:
    """Whether a tensor of a checkpoint is not wanted: main weights that equal the model's."""
    return saved == DISTRIBUTED and own == PLAIN and name.startswith(_MAIN[DISTRIBUTED])


def ask_for(wanted: dict[str, Any], saved: str, own: str) -> None:
    """Change in place what an optimizer of form `own` asks for into what a checkpoint of form `saved` has."""
    if saved == own:
        return
    if own == DISTRIBUTED:
        for tensors in wanted["param_state"].values():
            main = tensors.pop("param")
            if saved == MIXED:
                tensors["param"] = _renamed(main, own, saved)
    elif own == MIXED and saved == DISTRIBUTED:
        groups = wanted["fp32_from_fp16_params"]
        wanted["fp32_from_fp16_params"] = [[_renamed(t, own, saved) for t in group] for group in groups]


def _renamed(tensor: ShardedTensor, own: str, saved: str) -> ShardedTensor:
    return replace(tensor, key=_MAIN[saved] + tensor.key.removeprefix(_MAIN[own]))


def translate(loaded: dict[str, Any], saved: str, own: str) -> dict[str, Any]:
    """What was loaded from form `saved` after `ask_for`, as an optimizer of form `own` takes it.

    Main weights that the checkpoint lacks stay out: they are the model's.
    """
    if DISTRIBUTED not in (saved, own) or saved == own:
        return loaded
    if own == DISTRIBUTED:
        values = loaded["optimizer"] if saved == MIXED else loaded
        step = values["state"].get("common_step")
        count = {} if step is None else {"step": float(step)}
        return {
            "optimizer": {"param_groups": [{**group, **count} for group in values["param_groups"]]},
            "param_state": loaded["param_state"],
            "param_state_sharding_type": "fully_reshardable",
        }
    groups = loaded["optimizer"]["param_groups"]
    inner = loaded["optimizer"] if own == MIXED else loaded
    # Which parameters a group holds is known here, not in the checkpoint; for `MIXED` both are merged by now.
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
