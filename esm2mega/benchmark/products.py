"""Makes passes of products of matrices and of copies, alone, and counts the products of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esm2mega import vocabulary
from esm2mega.benchmark.turns import Pass
from esm2mega.config.presets import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def product(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Pass:
    """Return the product ``[m, k] x [k, n]``, whose units are operations; int8 is summed up in int32.

    Raises:
        RuntimeError: The device has none for this type.
    """
    left, right = (_random(rows, columns, dtype, device) for rows, columns in ((m, k), (k, n)))
    multiply: Callable[[Tensor, Tensor], Tensor] = torch._int_mm if dtype == torch.int8 else torch.mm
    multiply(left[:32, :32].contiguous(), right[:32, :32].contiguous())
    return Pass(lambda: multiply(left, right), 2.0 * m * k * n)


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=dtype, device=device)
    return torch.randn(rows, columns, dtype=dtype, device=device)


def copy(size: int, device: torch.device) -> Pass:
    """Return a copy of `size` bytes, whose units are the bytes that it reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Pass(lambda: target.copy_(source), 2.0 * size)


def forward_flops(shape: ModelShape, lengths: Sequence[int], has_logits: bool) -> int:
    """Count the products of a forward pass, two operations each.

    These are the products of the published model: what a program leaves out, pads or computes again does not
    change the count.

    Args:
        shape: Of the model.
        lengths: Tokens of each protein.
        has_logits: Whether the head computes logits, of all tokens.
    """
    h, layers = shape.hidden_size, shape.num_layers
    weights = layers * (4 * h * h + 2 * h * shape.ffn_hidden_size)
    if has_logits:
        weights += h * h + h * len(vocabulary.VOCAB)
    return 2 * weights * sum(lengths) + 4 * layers * h * sum(length**2 for length in lengths)


def model_flops(shape: ModelShape, lengths: Sequence[int]) -> int:
    """Count the products of a forward and a backward pass, with logits of all tokens, as `forward_flops`."""
    return 3 * forward_flops(shape, lengths, has_logits=True)
