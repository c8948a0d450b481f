"""Computes ESM-2's rotary positions: half-split pairs, base 10000, frequencies that the checkpoint holds.

Legend: ``T`` tokens of a pack, ``n`` heads, ``t`` tensor-parallel size, ``d`` head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor

from esm2mega.model.kernels import native, native_rotary
from esm2mega.model.packed import PackedSequences

ROTARY_BASE = 10000.0


def rotary_frequencies(head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Compute ``10000^(-2i/d)`` for each pair of channels: ``[d / 2]``."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    return 1.0 / ROTARY_BASE**exponents


class RotaryTables(MegatronModule):
    """Holds the frequencies, and makes the cos/sin tables of a pack.

    The frequencies are part of the checkpoint: published ESM-2 weights were trained with fp16-rounded ones,
    and recomputing them changes the logits (Hugging Face transformers PR #19587). They are fp32 in fp32 and
    bf16 models and fp64 in fp64 models, and never follow a cast of the weights.
    """

    inv_freq: Tensor

    def __init__(self, config: TransformerConfig, device: torch.device, vp_stage: int | None = None) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.vp_stage = vp_stage or 0
        dtype = torch.float64 if config.params_dtype == torch.float64 else torch.float32
        # [d / 2]
        self.register_buffer("inv_freq", rotary_frequencies(config.kv_channels, dtype, device))
        best_turn(device, config.params_dtype)  # tries the kernel, so that no step has to wait for that

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        """Follow ``.to``, ``.bfloat16`` and the like to another device, but not to another precision."""
        frequencies = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = frequencies.to(self.inv_freq.device)
        return self

    def forward(self, packed: PackedSequences) -> Tensor:
        """Make the tables for every token: ``[2, T, 1, d / 2]``, cos then sin, in the frequencies' dtype."""
        angles = torch.outer(packed.positions().to(self.inv_freq.dtype), self.inv_freq)
        return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Describe the frequencies for a checkpoint; all stages hold the same, so one writes and all read."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        chunk = self.vp_stage * parallel_state.get_pipeline_model_parallel_world_size() + stage
        key = f"{prefix}inv_freq"
        tensor = make_sharded_tensor_for_checkpoint(
            self.inv_freq,
            key,
            sharded_offsets,
            replica_id=(
                chunk,
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
            ),
        )
        return {key: tensor}


class _SplitAndRotate(torch.autograd.Function):
    """Splits the fused projection and rotates q and k in one pass.

    The backward pass is the rotation by the negative angle.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(tables)
        parts = qkv.unbind(dim=2)
        q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in parts)
        best_turn(qkv.device, qkv.dtype)(parts, (q, k, v), tables)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (tables,) = ctx.saved_tensors
        dq = grads[0]
        dqkv = dq.new_empty(*dq.shape[:2], 3, dq.shape[2])
        best_turn(dq.device, dq.dtype)(grads, dqkv.unbind(dim=2), tables, back=True)
        return dqkv, None


def turn(sources: Sequence[Tensor], targets: Sequence[Tensor], tables: Tensor, back: bool = False) -> None:
    """Write q and k turned, and v as it is, with PyTorch's operations on any device.

    It is computed in the dtype of the tables, and rounded once.

    Args:
        sources: q, k and v, each ``[T, n/t, d]``.
        targets: As `sources`.
        tables: ``[2, T, 1, d / 2]``, cos then sin.
        back: Turn by the negative angles.
    """
    cos, sin = tables[0], -tables[1] if back else tables[1]
    for x, out in zip(sources[:2], targets[:2], strict=True):
        _rotate(x, cos, sin, out)
    targets[2].copy_(sources[2])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate pair ``(i, i + d/2)`` of ``x [T, n/t, d]`` into `out`."""
    # [T, n/t, d] -> [T, n/t, 2, d / 2], with the tables as [T, 1, 1, d / 2]
    halves, turned = x.unflatten(-1, (2, -1)), out.unflatten(-1, (2, -1))
    if out.dtype == cos.dtype:
        # In place: no temporaries.
        products = torch.mul(halves, cos.unsqueeze(-2), out=turned)
    else:
        products = halves * cos.unsqueeze(-2)
    products[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
    products[..., 1, :].addcmul_(halves[..., 0, :], sin)
    if products is not turned:
        turned.copy_(products)


@cache
def best_turn(device: torch.device, dtype: torch.dtype) -> Callable[..., None]:
    """Return the fastest that computes what `turn` computes: of `native_rotary`, `triton_rotary`, or `turn`.

    That of CUDA is tried once, when a model is built, and then the host waits for it.
    """
    if device.type == "cpu" and dtype in native.PREFIXES and native.defect() is None:
        return native_rotary.turn
    if device.type != "cuda":
        return turn
    try:
        from esm2mega.model.kernels import triton_rotary
    except ModuleNotFoundError:  # Triton comes with PyTorch for CUDA, but not with every build of it
        return turn
    try:
        defect = _defect(triton_rotary.turn, device, dtype)
    except Exception as error:  # whatever a compiler of kernels may raise
        defect = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if defect is None:
        return triton_rotary.turn
    print(
        f"esm2mega: the kernel for rotary positions does not work here ({defect}); PyTorch's do instead",
        file=sys.stderr,
        flush=True,
    )
    return turn


def _defect(kernel: Callable[..., None], device: torch.device, dtype: torch.dtype) -> str | None:
    """Return how far a kernel is from `turn`, if it is, in both directions."""
    wide = torch.promote_types(dtype, torch.float32)
    # No random numbers: a machine with the kernel must draw the same ones later as a machine without.
    values = torch.linspace(-40.0, 40.0, 2 * 5 * 12 + 5 * 3 * 3 * 24, dtype=wide, device=device).sin()
    tables = values[: 2 * 5 * 12].view(2, 5, 1, 12)
    qkv = values[2 * 5 * 12 :].view(5, 3, 3, 24).to(dtype).unbind(dim=2)
    for back in (False, True):
        ours, theirs = torch.empty(2, 3, 5, 3, 24, dtype=dtype, device=device)
        kernel(qkv, ours.unbind(), tables, back)
        turn(qkv, theirs.unbind(), tables, back)
        differs = (ours - theirs).abs().max().item()
        # Products may be rounded before they are added, or not.
        if not differs <= 2 * torch.finfo(dtype).eps * theirs.abs().max().item():
            return f"it is off by {differs:.1g}"
    return None


def split_and_rotate(qkv: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Separate the fused projection and rotate q and k.

    Args:
        qkv: ``[T, n/t, 3, d]``.
        tables: ``[2, T, 1, d / 2]`` from `RotaryTables`.

    Returns:
        q, k and v, each ``[T, n/t, d]``.
    """
    return _SplitAndRotate.apply(qkv, tables)
