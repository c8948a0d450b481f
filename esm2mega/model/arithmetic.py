"""Says in which arithmetic a model computes: fp32 of a GPU may be rounded to TF32."""

from __future__ import annotations

import os
from typing import Any

import torch

from esm2mega.model.build import DTYPES

TF32_CAPABILITY = (8, 0)
"""Is the first compute capability whose products can round fp32 to TF32, which has 10 bits of mantissa."""

TF32_SWITCH = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
"""Names the variable that lets them, which PyTorch reads when it starts."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def arithmetic(config: Any, device: torch.device) -> str:
    """Return the precision of a model for a reader, in fp32 on a GPU with what becomes of TF32.

    PyTorch's products round to TF32 only where that is asked for, by `TF32_SWITCH` for example; those of
    Transformer Engine's layers always do.

    Args:
        config: Configuration of the model, an `ESM2TransformerConfig`.
        device: Where the model lives.
    """
    name = _NAMES[config.params_dtype]
    if config.fp8:
        return (
            f"{name} with FP8 ({config.fp8}, {config.fp8_recipe.value}) in the linears of Transformer Engine"
        )
    if name != "fp32" or not can_round_to_tf32(device):
        return name
    if products_round_to_tf32():
        return "fp32 with TF32"
    if config.layer_spec == "te" and not _is_forbidden():
        return "fp32 with TF32 in the linears of Transformer Engine"
    return "fp32 without TF32"


def products_round_to_tf32() -> bool:
    """Return whether PyTorch's products of fp32 round to TF32 on a device that can."""
    return torch.get_float32_matmul_precision() != "highest" and not _is_forbidden()


def _is_forbidden() -> bool:
    """Return whether NVIDIA's libraries are told not to, which they obey before their callers."""
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


def can_round_to_tf32(device: torch.device) -> bool:
    """Return whether fp32 on a device may mean TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY


def describe_computing(config: Any, device: torch.device, trained: str) -> str:
    """Say in one line how embeddings, scores or predictions were computed.

    Args:
        config: Configuration of the model.
        device: Where the model lives.
        trained: Precision of the checkpoint.
    """
    line = f"computed in {arithmetic(config, device)} on {device.type}, attention {config.packed_attention}"
    if _NAMES[config.params_dtype] != trained:
        return f"{line}; the checkpoint is in {trained}"
    if trained == "fp32" and can_round_to_tf32(device):
        return f"{line}; infer.precision=bf16 is faster on this device"
    return line
