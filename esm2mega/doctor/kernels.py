"""Checks the kernels that make a GPU fast by computing with them: attention and Transformer Engine.

A package counts only with its kernels: a module of the right name proves nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from esm2mega.doctor.child import run_apart
from esm2mega.doctor.finding import FAILED, MISSING, OK, Finding
from esm2mega.doctor.packages import installed_version

if TYPE_CHECKING:
    import torch

SECONDS = 120.0
"""Limits how long a check takes; Transformer Engine imports for long."""

AMPERE = (8, 0)
"""Is the first compute capability that the fused attention kernels have code for."""

KERNEL_ERROR = 0.03
"""Bounds the difference of attention in bf16 from fp32; outputs are averages of values around 1."""

NATIVE_CURE = "install g++, with which attention on a CPU takes half the time"
CACHE_CURE = "set XDG_CACHE_HOME to a folder of yours that can be written to, or reinstall g++"
VARLEN_CURE = "install torch 2.11 or newer"
FLASH_CURE = "pip install flash-attn on a CUDA machine"
TE_CURE = "pip install 'esm2mega[te]' on a CUDA machine"
NO_DEVICE = "it needs a CUDA device"


def check_attention() -> Iterator[Finding]:
    """Yield which values of `model.attention_backend` this machine can run; `sdpa` runs everywhere."""
    import torch

    device, capability = torch.device("cpu"), None
    if (cuda := cuda_device()) is not None:
        device = cuda
        # A run has one kernel for all its devices.
        capability = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    yield sdpa_finding(device)
    if cuda is None:
        yield native_finding()
    yield fused_finding("varlen", VARLEN_CURE, device, capability)
    yield fused_finding("flash", FLASH_CURE, device, capability)


def sdpa_finding(device: torch.device) -> Finding:
    """Return whether the attention that runs everywhere computes on a device."""
    import torch

    what = "attention backend sdpa"
    if (defect := _attention_defect("sdpa", device, torch.float32)) is not None:
        return Finding(FAILED, f"{what}: {defect}", "reinstall torch")
    return Finding(OK, f"{what}: computed on {device.type}, usable on every device")


def native_finding() -> Finding:
    """Return whether our own attention for CPUs compiles, and computes."""
    import torch

    from esm2mega.model.kernels import native

    what = "attention backend native"
    if (defect := native.defect()) is not None:
        return Finding(
            MISSING, f"{what}: {defect}", NATIVE_CURE if "no C++ compiler" in defect else CACHE_CURE
        )
    if (defect := _attention_defect("native", torch.device("cpu"), torch.float32)) is not None:
        return Finding(FAILED, f"{what}: {defect}", "set model.attention_backend=sdpa")
    return Finding(OK, f"{what}: compiled for this processor, and computed")


def fused_finding(
    kernel: str, cure: str, device: torch.device, capability: tuple[int, int] | None
) -> Finding:
    """Return whether a fused kernel can be called, and computes on this device.

    Args:
        kernel: A name of `esm2mega.model.attention.FUSED`.
        cure: What to do if it cannot be called.
        device: Where to compute.
        capability: The compute capability of that device; None for a CPU.
    """
    import torch

    from esm2mega.model.attention import kernel_defect

    what = f"attention backend {kernel}"
    if (defect := kernel_defect(kernel)) is not None:
        return Finding(MISSING, f"{what}: {defect}", cure)
    if capability is None:
        return Finding(MISSING, f"{what}: found", NO_DEVICE)
    if capability < AMPERE:
        text, first = (".".join(map(str, each)) for each in (capability, AMPERE))
        return Finding(
            MISSING, f"{what}: found", f"it needs compute capability {first}, and this machine has {text}"
        )
    if (defect := _attention_defect(kernel, device, torch.bfloat16)) is not None:
        return Finding(FAILED, f"{what}: {defect}", "set model.attention_backend=sdpa, and reinstall it")
    return Finding(OK, f"{what}: computed on {device.type}")


def _attention_defect(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Attend with a kernel to a pack of two sequences, and return what is wrong with the output, or None."""
    import torch

    from esm2mega.model.attention import KERNELS
    from esm2mega.model.packed import PackedSequences

    lengths, heads, dim = (5, 11), 2, 64
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, sum(lengths), heads, dim, generator=generator)
    # [l, n, d] per sequence; softmax over its own keys
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat(
        [
            torch.einsum("nqk,knd->qnd", (torch.einsum("qnd,knd->nqk", a, b) * dim**-0.5).softmax(-1), c)
            for a, b, c in parts
        ]
    )
    packed = PackedSequences.from_lengths(lengths, device)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    try:
        output = KERNELS[kernel](q, k, v, packed, dim**-0.5).float().cpu()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    off = (output - expected).abs().max().item()
    return None if off < KERNEL_ERROR else f"an output is off by {off:.2g}"


def check_transformer_engine() -> Iterator[Finding]:
    """Try Transformer Engine, in a process of its own, if a module of that name is there.

    Megatron-Core imports it wherever it is found, so that a broken one stops every training.
    """
    what = "attention backend te and model.layer_spec=te"
    if importlib.util.find_spec("transformer_engine") is None:
        yield Finding(MISSING, f"{what}: no module transformer_engine", TE_CURE)
        return
    rebuild = f"uninstall it, or {TE_CURE}"
    yield from run_apart(__name__, "te_findings", f"{what}: its import or its kernels", rebuild, SECONDS)


def te_findings() -> Iterator[Finding]:
    """Import what Megatron-Core takes from Transformer Engine, and compute a layer and attention with it."""
    import torch

    what = (
        f"attention backend te and model.layer_spec=te: transformer-engine {_version('transformer-engine')}"
    )
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        linear, attention = te.LayerNormLinear, te.DotProductAttention
    except (ImportError, AttributeError) as error:
        yield Finding(MISSING, f"{what} without its kernels ({_first_line(error)})", TE_CURE)
        return
    if (device := cuda_device()) is None:
        yield Finding(MISSING, f"{what} found", NO_DEVICE)
        return
    settings = {"params_dtype": torch.bfloat16, "device": device}
    x = torch.randn(16, 128, dtype=torch.bfloat16, device=device)
    q, k, v = linear(128, 384, **settings)(x).view(16, 3, 2, 64).unbind(1)
    borders = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
    attend = attention(num_attention_heads=2, kv_channels=64, qkv_format="thd", attn_mask_type="padding")
    out = attend(
        *(each.contiguous() for each in (q, k, v)),
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=11,
        max_seqlen_kv=11,
    )
    out.float().sum().backward()
    if not out.isfinite().all():
        yield Finding(FAILED, f"{what}: an output is not finite", f"uninstall it, or {TE_CURE}")
        return
    yield Finding(OK, f"{what}: computed a layer and attention")


def cuda_device() -> torch.device | None:
    """Return the CUDA device to compute on, or None where there is none."""
    import torch

    return torch.device("cuda") if torch.cuda.is_available() else None


def _version(distribution: str) -> str:
    return installed_version(distribution) or "of unknown version"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
