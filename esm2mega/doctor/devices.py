"""Checks the CPU, every CUDA device, and in which precisions they compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from esm2mega import processor
from esm2mega.doctor.finding import FAILED, MISSING, OK, WARNING, Finding

if TYPE_CHECKING:
    import torch

BF16_ERROR = 2.0**-6
"""Bounds the relative error of a product in bf16: inputs and result are rounded by up to 2^-9 each."""


def check_cpu() -> Finding:
    """Return how many cores this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    return Finding(OK, f"cpu: {cores} core{'s' * (cores > 1)} usable, OMP_NUM_THREADS={threads}")


def check_devices() -> Iterator[Finding]:
    """Yield every CUDA device, and bf16 on each device and on the CPU."""
    import torch

    from esm2mega.model.arithmetic import TF32_CAPABILITY

    yield _bf16_on_cpu()
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else " and this torch is a CPU build"
        yield Finding(MISSING, f"cuda device: none found{build}", "training runs on the CPU over gloo")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = properties.major, properties.minor
        text = ".".join(map(str, capability))
        yield Finding(OK, f"cuda:{index}: {properties.name}, {memory:.0f} GiB, compute capability {text}")
        yield _bf16_on_cuda(index, capability)
        if capability >= TF32_CAPABILITY:
            yield _fp32_on_cuda(index)


def _bf16_on_cpu() -> Finding:
    import torch

    what = "bf16 on cpu"
    if (defect := bf16_defect(torch.device("cpu"))) is not None:
        return Finding(FAILED, f"{what}: {defect}", "set model.precision=fp32, and reinstall torch")
    fast = processor.instructions(processor.BF16)
    advice = "faster than fp32: set model.precision=bf16, or give embed --precision bf16"
    with_what = (
        f"with {', '.join(fast)}, {advice}" if fast else "without instructions for it, slower than fp32"
    )
    return Finding(OK, f"{what}: computed, {with_what}")


def multiplies_bf16() -> bool:
    """Return whether the device that this process trains on has instructions for products in bf16."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(processor.instructions(processor.BF16))


def _bf16_on_cuda(index: int, capability: tuple[int, int]) -> Finding:
    import torch

    what = f"bf16 on cuda:{index}"
    if (defect := bf16_defect(torch.device("cuda", index))) is not None:
        return Finding(FAILED, f"{what}: {defect}", "free the device, update its driver, or leave it out")
    if capability < (8, 0):
        return Finding(
            WARNING,
            f"{what}: computed in fp32, since compute capability 8.0 is the first with bf16",
            "set model.precision=fp32",
        )
    return Finding(OK, f"{what}: computed")


def _fp32_on_cuda(index: int) -> Finding:
    from esm2mega.model.arithmetic import TF32_SWITCH, products_round_to_tf32

    if products_round_to_tf32():
        return Finding(OK, f"fp32 on cuda:{index}: with TF32; {TF32_SWITCH}=0 turns it off")
    return Finding(OK, f"fp32 on cuda:{index}: without TF32; {TF32_SWITCH}=1 turns it on")


def bf16_defect(device: torch.device) -> str | None:
    """Multiply two matrices in bf16 on a device, and return what is wrong with the product, or None."""
    import torch

    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 64, 64, generator=generator)
    try:
        product = (a.to(device, torch.bfloat16) @ b.to(device, torch.bfloat16)).cpu()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    expected = a.double() @ b.double()
    # All numbers are positive, so nothing cancels and relative errors stay small.
    off = ((product.double() - expected).abs() / expected).max().item()
    if product.dtype != torch.bfloat16 or not off < BF16_ERROR:
        return f"a product is off by {off:.1%}"
    return None
