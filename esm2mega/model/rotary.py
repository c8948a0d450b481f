"""Computes ESM-2's rotary positions: half-split pairs, base 10000, frequencies that the checkpoint holds.

Legend: ``T`` tokens of a pack, ``n`` heads, ``t`` tensor-parallel size, ``d`` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor

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
        q, k, v = qkv.unbind(dim=2)
        rotated = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
        for x, out in zip((q, k), rotated, strict=True):
            _rotate(x, tables[0], tables[1], out)
        return rotated[0], rotated[1], v.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (tables,) = ctx.saved_tensors
        dq, dk, dv = grads
        dqkv = dq.new_empty(*dq.shape[:2], 3, dq.shape[2])
        _rotate(dq, tables[0], -tables[1], dqkv[:, :, 0])
        _rotate(dk, tables[0], -tables[1], dqkv[:, :, 1])
        dqkv[:, :, 2] = dv
        return dqkv, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate pair ``(i, i + d/2)`` of ``x [T, n/t, d]`` into `out`.

    It is computed in the dtype of the tables, and rounded once.
    """
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    if out.dtype == cos.dtype:
        # In place: no temporaries.
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        return
    # First the products with cos, then sin is added in place: two passes, no temporary in fp32.
    out_first.copy_(torch.addcmul(first * cos, second, sin, value=-1))
    out_second.copy_(torch.addcmul(second * cos, first, sin))


def split_and_rotate(qkv: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Separate the fused projection and rotate q and k.

    Args:
        qkv: ``[T, n/t, 3, d]``.
        tables: ``[2, T, 1, d / 2]`` from `RotaryTables`.

    Returns:
        q, k and v, each ``[T, n/t, d]``.
    """
    return _SplitAndRotate.apply(qkv, tables)
