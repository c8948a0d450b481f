"""Provides multi-tensor kernels for gradient norm and clipping without Transformer Engine or apex.

Megatron-Core's own fallback takes each tensor's norm in a Python loop with a device synchronisation per
tensor and rounds the result to fp32. ``torch._foreach_*`` does the same in a few launches and keeps the
tensors' dtype, which the fp64 proofs need. On a GPU, fused kernels that Megatron-Core found stay in place. On
a CPU they cannot run, and Megatron-Core takes them wherever they are installed.
"""

from __future__ import annotations

import megatron.core.optimizer
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale


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


def install(device: torch.device) -> None:
    """Make gradient clipping use these kernels, unless Megatron-Core has fused ones that run on `device`."""
    if device.type == "cpu":
        _refuse_fused_kernels()
    elif not clip_grads.l2_norm_impl.__name__.startswith("local_"):
        return
    clip_grads.l2_norm_impl = foreach_l2_norm
    clip_grads.multi_tensor_scale_impl = foreach_scale


def _refuse_fused_kernels() -> None:
    """Set what Megatron-Core sets at its import where neither Transformer Engine nor apex is installed."""
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        setattr(distrib_optimizer, name, False)
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = local_multi_tensor_applier
    optimizer.multi_tensor_scale_impl = local_multi_tensor_scale
