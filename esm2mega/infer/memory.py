"""Says before anything is computed how much memory and disk the largest pack of an output takes.

Legend: ``T`` tokens of the pack, ``h`` hidden size, ``f`` hidden size of the feed-forward block, ``n`` heads,
``t`` tensor-parallel size, ``c`` context-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ModelConfig
from esm2mega.infer.engine import OutputRequest
from esm2mega.model.build import DTYPES
from esm2mega.model.contact_maps import Span, is_long
from esm2mega.model.contact_tiles import PANEL_ELEMENTS, TILE

_ALLOCATOR = 1.15
"""Estimates what the allocators of PyTorch and of the C library take for each byte in use."""


@dataclass(frozen=True)
class Need:
    """Holds what a pack takes besides the weights.

    Attributes:
        memory: Bytes of memory of each process, on its device.
        disk: Bytes of disk of each process while contacts are computed.
    """

    memory: int
    disk: int


def need_of(
    model: ModelConfig,
    request: OutputRequest,
    tokens: int,
    windows: int,
    tp_size: int,
    cp_size: int,
    stored_bytes: int,
) -> Need:
    """Compute what the pack of a long protein, or of a window of it, needs.

    Within a layer, attention holds the residual and the normalised states (h each), the fused projection and
    q, k and v (3 h each), and what it returns (h); the feed-forward block the residual, the normalised states
    and its output (h each), and its hidden states before and behind the activation (f each). With a kernel
    that computes attention in blocks, only contacts grow with the square of a length, and these lie on disk.
    Context-parallel processes have T / c tokens in a layer, and copies of what they exchange (three times
    3 h); all of them have all tokens of what is put out, and for contacts q and k of all tokens.

    Args:
        model: Shape and precision.
        request: What is computed.
        tokens: T, all of them of one window.
        windows: How many windows of the protein are joined; all but the last wait for it.
        tp_size: t.
        cp_size: c.
        stored_bytes: Bytes of a number in the output.
    """
    shape = shape_of(model)
    h, f, n = shape.hidden_size, shape.ffn_hidden_size // tp_size, shape.num_attention_heads // tp_size
    size = DTYPES[model.precision].itemsize
    wide = max(size, 4)
    exchanged = 9 / tp_size if cp_size > 1 else 0
    attention = (2 + 7 / tp_size + exchanged) * h * size * tokens / cp_size
    feed_forward = (3 * h + 2 * f) * size * tokens / cp_size
    # The language-model head sees all tokens on every process.
    head = 3 * h * size * tokens if request.logits else 0
    span = Span(0, tokens, slice(1, tokens - 1))
    length = tokens - 2
    has_contacts = request.contact_head is not None
    disk = held = waiting = 0
    if has_contacts and cp_size > 1:
        attention += 4 * h / tp_size * size * tokens
        n = -(-n // cp_size)
    if has_contacts and is_long(span):
        panels = 2 * PANEL_ELEMENTS * wide + 3 * min(n, PANEL_ELEMENTS // TILE**2) * TILE**2 * wide
        channels = shape.hidden_size // shape.num_attention_heads
        attention += n * (3 * channels * wide + wide + 3 * 8) * tokens + panels
        disk = windows * ((length // TILE + 1) ** 2 // 2) * TILE**2 * wide
        held += TILE * length * (2 * wide + stored_bytes + 1)
    elif has_contacts:
        attention += 4 * PANEL_ELEMENTS * wide + length**2 * wide
        held += length**2 * (2 * wide + stored_bytes + 1)
        waiting = length**2 * wide
    outputs = len(request.layers) * h * size * tokens + (2 * 33 * wide * tokens if request.logits else 0)
    # A layer's output is rounded and copied while the others wait to be written.
    written = h * (wide + stored_bytes + 1) * tokens if request.layers else 0
    peak = max(max(attention, feed_forward, head) + outputs, outputs + max(written, held))
    peak += (windows - 1) * (outputs + waiting)
    return Need(int(_ALLOCATOR * peak), disk)


def used_bytes(device: torch.device) -> int:
    """Return the bytes that this process has on its device: the weights, and on a CPU the program."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)
