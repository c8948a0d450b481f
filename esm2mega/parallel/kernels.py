"""Computes the gradient norm and clips by it without asking the device for a number.

Megatron-Core's functions take the norm to the host, which then waits for the whole backward pass before it
can launch the update. Here norm, factor and the decision whether to update stay on the device, in a few
launches of ``torch._foreach_*``, which keep the tensors' dtype, as the fp64 proofs need. The update itself is
PyTorch's fused Adam on every machine: it can be skipped by a flag on the device, and its state has one form.
"""

from __future__ import annotations

from typing import Any

import megatron.core.optimizer
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, clip_grads, distrib_optimizer, optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale
from torch import Tensor


def foreach_l2_norm(
    chunk_size: int, overflow_buffer: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the L2 norm over all tensors, with the calling convention of apex's ``multi_tensor_l2norm``.

    Args:
        chunk_size: Ignored; part of the convention.
        overflow_buffer: Ignored; part of the convention.
        tensor_lists: One list of tensors.
        per_tensor: Also return each tensor's norm.

    Returns:
        Norm over all tensors, ``[1]``, in their dtype; and the norm of each, ``[n]``, or None.
    """
    norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
    total = torch.linalg.vector_norm(norms).reshape(1)
    return total, norms if per_tensor else None


def foreach_scale(
    chunk_size: int, overflow_buffer: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Write the first list, scaled, to the second, with apex's convention for ``multi_tensor_scale``."""
    source, target = tensor_lists
    if source is not target:
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, scale)


def foreach_copy(this: list[Tensor], that: list[Tensor], overflow_buf: Tensor | None = None) -> None:
    """Copy the first list to the second, with the convention of Megatron-Core's copies between weights.

    Args:
        this: Source.
        that: Target, in another dtype or the same.
        overflow_buf: Ignored; part of the convention.
    """
    if this:
        torch._foreach_copy_(that, this)


def _copy_shards(self: DistributedOptimizer) -> None:
    """Copy this rank's shards of the main weights into the model's, whose fp32 shards are the main ones."""
    groups = zip(self.shard_fp32_from_float16_groups, self.shard_float16_groups, strict=True)
    for main_group, group in groups if not self.is_stub_optimizer else ():
        foreach_copy(main_group, group)


@torch.no_grad()
def squared_norm(optimizer: MegatronOptimizer) -> Tensor:
    """Compute the sum of squares over the gradient of the whole model: ``[1]``, in fp32, or fp64 in fp64.

    All ranks call this together; the sum is over the ranks that share the model (with the distributed
    optimizer over the world), and each of them holds the result.
    """
    part = _only_part(optimizer)
    # The second is the name in Megatron-Core 0.19.
    names = "get_main_grads_for_grad_norm", "get_grads_for_grad_norm"
    gradients = next(getattr(part, name) for name in names if hasattr(part, name))()
    if gradients:
        norm, _ = foreach_l2_norm(0, gradients[0], [gradients], per_tensor=False)
        total = norm**2.0
    else:
        # All weights of this rank are frozen, or copies.
        dtype = torch.promote_types(part.config.params_dtype, torch.float32)
        total = torch.zeros(1, dtype=dtype, device=optimizer.get_loss_scale().device)
    dist.all_reduce(total, group=part.get_grad_stats_parallel_group())
    return total


@torch.no_grad()
def clip(optimizer: MegatronOptimizer, squares: Tensor) -> None:
    """Scale the gradients down if their norm is above `optim.clip_grad`, else by 1.

    Args:
        optimizer: Holds the gradients.
        squares: What `squared_norm` has returned.
    """
    part = _only_part(optimizer)
    # A rank whose weights are all frozen has an optimizer of nothing.
    gradients = [p.grad for p in part.get_parameters() if p.grad is not None]
    if gradients:
        wide = squares.double().reshape(())
        # A number divided by a tensor would be multiplied by the reciprocal, which rounds twice.
        factor = torch.full_like(wide, part.config.clip_grad) / (wide.sqrt() + 1.0e-6)
        torch._foreach_mul_(gradients, factor.clamp(max=1.0).to(gradients[0].dtype))


def update_unless(optimizer: MegatronOptimizer, is_bad: Tensor) -> None:
    """Update the weights, or leave them and the optimizer as they are, bit for bit.

    Args:
        optimizer: With gradients that are ready.
        is_bad: 1.0 to leave them, else 0.0; fp32 ``[]`` on the device, the same on every rank.
    """
    part = _only_part(optimizer)
    if part.optimizer is not None:
        # Where PyTorch's loss scaling tells its fused optimizers the same.
        part.optimizer.found_inf = is_bad
    optimizer.step_with_ready_grads()


def _only_part(optimizer: MegatronOptimizer) -> Any:
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


def install(device: torch.device) -> None:
    """Make Megatron-Core use PyTorch's Adam, and on a CPU nothing of Transformer Engine or apex.

    This sets what Megatron-Core sets at its import where neither of them is installed. Its own clipping gets
    these kernels, unless it has found fused ones that run on `device`. Weights are copied in a few launches,
    where Megatron-Core copies one tensor after the other.
    """
    optimizer._multi_tensor_copy_this_to_that = foreach_copy
    DistributedOptimizer._copy_main_params_to_model_params = _copy_shards
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        setattr(distrib_optimizer, name, False)
    if device.type == "cpu":
        for module in (clip_grads, optimizer):
            module.multi_tensor_applier = local_multi_tensor_applier
        optimizer.multi_tensor_scale_impl = local_multi_tensor_scale
    elif not clip_grads.l2_norm_impl.__name__.startswith("local_"):
        return
    clip_grads.l2_norm_impl = foreach_l2_norm
    clip_grads.multi_tensor_scale_impl = foreach_scale
