"""Computes bidirectional self-attention over a pack: each sequence attends to itself and to nothing else.

Legend: ``T`` tokens of a pack, ``m`` of them as queries (all, or those that get logits), ``h`` hidden size,
``n`` heads, ``t`` tensor-parallel size, ``d`` head dimension.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from esm2mega.errors import UserError
from esm2mega.model.dropout import FIRST_HEAD, drop, place_of
from esm2mega.model.kernels import native, native_attention
from esm2mega.model.packed import PackedSequences
from esm2mega.model.rotary import split_and_rotate

Kernel = Callable[[Tensor, Tensor, Tensor, PackedSequences, float], Tensor]
"""Takes q ``[m, n/t, d]``, k and v ``[T, n/t, d]``, borders and scale, and returns ``[m, n/t, d]``."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """Attend with PyTorch's own function, one call per sequence, on any device and in any dtype."""
    outputs = []
    # split, not slicing: the backward of a slice fills the whole tensor with zeros once per sequence.
    for segment in zip(
        q.split(packed.query_lens), k.split(packed.seqlens), v.split(packed.seqlens), strict=True
    ):
        # [l, n/t, d] -> [1, n/t, l, d]
        qs, ks, vs = (x.transpose(0, 1).unsqueeze(0) for x in segment)
        if not qs.numel():  # a sequence without labels
            continue
        out = scaled_dot_product_attention(qs, ks, vs, scale=scale)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def sdpa_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float, p: float, places: Tensor
) -> Tensor:
    """Attend as `sdpa` does, and drop probabilities by keys of the queries; on any device, in any dtype.

    PyTorch's function takes no mask of what is dropped, so the probabilities are made in memory: for a
    sequence of l tokens ``n/t * l * l`` numbers, in fp32 at least.

    Args:
        q: As for `Kernel`, like the following ones.
        k: Keys.
        v: Values.
        packed: Borders, and keys of dropout.
        scale: Factor of the products of q and k.
        p: Probability to drop one, above 0 and below 1.
        places: Place of each head of this rank, see `esm2mega.model.dropout`, int64 ``[n/t]``.
    """
    assert packed.query_keys is not None  # `ESM2Model.encode` has checked it
    outputs = []
    for *segment, keys in zip(
        q.split(packed.query_lens),
        k.split(packed.seqlens),
        v.split(packed.seqlens),
        packed.query_keys.split(packed.query_lens),
        strict=True,
    ):
        if not keys.numel():
            continue
        # [l, n/t, d] -> [n/t, l, d]
        qs, ks, vs = (x.transpose(0, 1) for x in segment)
        wide = torch.promote_types(q.dtype, torch.float32)
        probabilities = torch.softmax((qs * scale) @ ks.transpose(1, 2), dim=-1, dtype=wide)
        kept = drop(probabilities, p, keys, places[:, None])
        outputs.append((kept.to(vs.dtype) @ vs).transpose(0, 1))
    return torch.cat(outputs)


def compiled(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """Attend with our own compiled kernel for the whole pack, on a CPU in fp32 or bf16."""
    return native_attention.attend(q, k, v, packed.cu_seqlens_q, packed.cu_seqlens_kv, scale)


def varlen(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """Attend with one kernel of `torch.nn.attention.varlen` for the whole pack, on CUDA in bf16 or fp16."""
    from torch.nn.attention.varlen import varlen_attn

    borders = packed.cu_seqlens_q, packed.cu_seqlens_kv
    attended = varlen_attn(q, k, v, *borders, packed.max_seqlen_q, packed.max_seqlen_kv, scale=scale)
    assert isinstance(attended, Tensor)  # a tuple only when further outputs are asked for
    return attended


def flash(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """Attend with the varlen kernel of the flash-attn package, on CUDA in bf16 or fp16."""
    from flash_attn import flash_attn_varlen_func

    borders = packed.cu_seqlens_q, packed.cu_seqlens_kv
    return flash_attn_varlen_func(
        q, k, v, *borders, packed.max_seqlen_q, packed.max_seqlen_kv, softmax_scale=scale
    )


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "native": compiled, "varlen": varlen, "flash": flash}

FUSED = {
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", "scale"),
    "flash": ("flash_attn", "flash_attn_varlen_func", "softmax_scale"),
}
"""Gives the module and the function that each fused kernel calls, and by which name it passes the scale."""


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of the kernel that `model.attention_backend` means on this device.

    Args:
        name: ``auto``, or one of `KERNELS`.
        device: Where the model lives.
        dtype: Data type of q, k and v.
        head_dim: Channels of a head, d.

    Raises:
        UserError: The kernel that was asked for by name cannot run here.
    """
    fused = _fused_kernels_run(device, dtype, head_dim)
    native_runs = device.type == "cpu" and native_attention.takes(dtype, head_dim)
    usable = {
        "sdpa": True,
        "native": name in ("auto", "native") and native_runs and native.defect() is None,
        "varlen": fused and kernel_defect("varlen") is None,
        "flash": fused and kernel_defect("flash") is None,
    }
    if name == "auto":
        return next(kernel for kernel in ("flash", "varlen", "native", "sdpa") if usable[kernel])
    if name == "te":
        raise UserError(
            "model.attention_backend=te needs bf16 or fp16, model.attention_dropout=0 and the Transformer "
            "Engine layers, which are not all given here; "
            "set model.attention_backend=auto, or model.layer_spec=te where it is installed"
        )
    if name == "native" and not usable[name]:
        given = f"this is {device.type} with {dtype}, head dimension {head_dim}"
        raise UserError(
            "model.attention_backend=native needs a CPU, fp32 or bf16, a head dimension that 8 divides, and "
            f"a C++ compiler; {native.defect() if native_runs else given}: "
            "set model.attention_backend=auto"
        )
    if not usable[name]:
        raise UserError(
            f"model.attention_backend={name} needs its package, bf16 or fp16, CUDA with compute capability "
            f"8.0 or more, and a head dimension that 8 divides, at most 256; this is {device.type} with "
            f"{dtype}, head dimension {head_dim}: set model.attention_backend=auto"
        )
    return name


def _fused_kernels_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Check what FlashAttention-2 needs, which both the varlen and the flash-attn kernels are built on."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def kernel_defect(kernel: str) -> str | None:
    """Return why a kernel of `FUSED` cannot be called as it is here, on any device, or None if it can.

    The name of the module is not enough: early releases of torch with `varlen_attn` give it no scale.
    """
    module, function, scale = FUSED[kernel]
    try:
        called = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        return f"no module {error.name}"
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        return f"module {module} cannot be imported ({str(error).partition(chr(10))[0]})"
    if called is None:
        return f"module {module} has no {function}"
    try:
        inspect.signature(called).bind(*["q", "k", "v", "cu_q", "cu_k", "max_q", "max_k"], **{scale: 1.0})
    except (TypeError, ValueError) as error:
        return f"{function} of {module} takes other arguments ({error})"
    return None


class PackedCoreAttention(MegatronModule):
    """Computes softmax attention within each sequence of a pack, in training with keyed dropout if any."""

    def __init__(
        self, config: Any, layer_number: int, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.kernel = KERNELS[config.packed_attention]
        self.first_place = place_of(layer_number, FIRST_HEAD)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences,
    ) -> Tensor:
        """Compute attention: q ``[m, n/t, d]``, k and v ``[T, n/t, d]`` -> ``[m, n/t, d]``.

        The borders of the sequences are the only mask. Under context parallelism all are ``[T/c, n/t, d]``,
        and the exchange with the other ranks is part of what recomputation repeats, so that its results are
        not kept.
        """
        exchange = packed_seq_params.exchange
        first_head = 0
        if exchange is not None or self._drops:
            first_head = first_head_of_this_rank(query.shape[1])
        if exchange is not None:
            return exchange.attend(query, key, value, first_head, self._attend)
        return self._attend(query, key, value, packed_seq_params, first_head)

    @property
    def _drops(self) -> bool:
        return self.training and self.config.keyed_attention_dropout > 0

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, first_head: int
    ) -> Tensor:
        """Attend with the heads from number `first_head` on, of all heads of the model."""
        if not self._drops:
            return self.kernel(query, key, value, packed, self.scale)
        heads = torch.arange(first_head, first_head + query.shape[1], device=query.device)
        p = self.config.keyed_attention_dropout
        return sdpa_with_dropout(query, key, value, packed, self.scale, p, self.first_place + heads)


def first_head_of_this_rank(count: int) -> int:
    """Return the number, among all heads, of the first of the `count` that this tensor-parallel rank has."""
    return parallel_state.get_tensor_model_parallel_rank() * count


class ESM2SelfAttention(SelfAttention):
    """Gives Megatron-Core's self-attention ESM-2's rotary tables, which are made once per micro-batch.

    The parent class would rebuild cos and sin for q and for k in every layer, and copy ``cu_seqlens`` to the
    host each time.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None,
        packed_seq_params: PackedSequences,
        rows: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend within each sequence.

        Args:
            hidden_states: ``[T, 1, h]``, or ``[T/t, 1, h]`` under sequence parallelism (the projection
                gathers).
            attention_mask: Unused: a pack needs no mask.
            rotary_pos_emb: ``[2, T, 1, d / 2]`` from `RotaryTables`; None in models with learned positions.
            packed_seq_params: Borders of the sequences.
            rows: int64 ``[m]``, the tokens whose output is wanted; all of them when None.
            **unused: Arguments that the transformer layer passes for decoders.

        Returns:
            Output in the layout of `hidden_states`, or ``[m, 1, h]`` at `rows`; and the bias ``[h]`` that the
            caller adds.
        """
        qkv, _ = self.linear_qkv(hidden_states)
        # [T, 1, 3h/t] -> [T, n/t, 3, d]: rows of the fused weight are head-major, q k v per head
        qkv = qkv.view(
            qkv.shape[0], self.num_attention_heads_per_partition, 3, self.hidden_size_per_attention_head
        )
        if rotary_pos_emb is None:
            query, key, value = (part.contiguous() for part in qkv.unbind(dim=2))
        else:
            query, key, value = split_and_rotate(qkv, rotary_pos_emb)
        context = self.attend(query, key, value, packed_seq_params, rows)
        return self.linear_proj(context)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, rows: Tensor | None = None
    ) -> Tensor:
        """Compute what the output projection gets: ``[T, 1, h/t]``, or ``[m, 1, h/t]`` at `rows`.

        Args:
            query: ``[T, n/t, d]``, as `key` and `value`.
            key: Rotated, as `query`.
            value: As projected.
            packed: Borders of the sequences.
            rows: As for `forward`.
        """
        # Our kernels accept fewer queries than keys. Transformer Engine's get all queries: they are chosen
        # and proven for self-attention, and the rest of the layer costs more.
        if rows is not None and isinstance(self.core_attention, PackedCoreAttention):
            query, packed = query.index_select(0, rows), packed.at_rows()
            rows = None
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed
            )
        else:
            context = self.core_attention(
                query,
                key,
                value,
                None,
                attn_mask_type=self.attn_mask_type,
                attention_bias=None,
                packed_seq_params=packed,
            )
        if rows is not None:
            context = context.index_select(0, rows)
        # [m, n/t, d] -> [m, 1, h/t]
        return context.flatten(1).unsqueeze(1)
