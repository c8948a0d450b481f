"""What the measurements of `gpu.py` share: device, clock, lengths of proteins, and products of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from batches import uniref_lengths
from gpu_lines import Line

from esm2mega import vocabulary
from esm2mega.config.presets import PRESETS, ModelShape
from esm2mega.train.throughput import memory_gb

Row = dict[str, Any]
"""Figures of a measurement by the heading of their column; None where there is none on this device."""

SEED = 1


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait until the device has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], line: Line) -> list[float]:
    """Time each repetition of `work`, from an idle device to an idle device."""
    for _ in range(line.warm_up):
        work()
    synchronize()
    times = []
    for _ in range(line.repetitions):
        started = time.perf_counter()
        work()
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def tera(per_second: float) -> float:
    """Return a rate in units of 1e12, to four digits, however small it is."""
    return float(f"{per_second / 1e12:.4g}")


def protein_lengths(line: Line, seed: int) -> list[int]:
    """Return the lengths of proteins that fill one micro-batch, in tokens."""
    if not line.full_length:
        return uniref_lengths(line.tokens, seed)
    width = min(1024, line.tokens)
    return [width] * (line.tokens // width)


def model_flops(shape: ModelShape, lengths: Sequence[int]) -> int:
    """Count the products of a forward and a backward pass, two operations each.

    These are the products of the published model with logits of all tokens: what a program leaves out, pads
    or computes again does not change the count.

    Args:
        shape: Of the model.
        lengths: Tokens of each protein.
    """
    h, layers = shape.hidden_size, shape.num_layers
    weights = layers * (4 * h * h + 2 * h * shape.ffn_hidden_size) + h * h + h * len(vocabulary.VOCAB)
    return 6 * weights * sum(lengths) + 12 * layers * h * sum(length**2 for length in lengths)


def figures_of_steps(line: Line, lengths: Sequence[int], times: list[float]) -> Row:
    """Return rate, time and memory of training steps over proteins of `lengths`."""
    seconds = statistics.median(times) / 1e3
    return {
        "size": line.size,
        "proteins": "1024 tokens each" if line.full_length else "as UniRef90",
        "tokens/step": sum(lengths),
        "ms/step": round(1e3 * seconds, 1),
        "fastest": round(min(times), 1),
        "slowest": round(max(times), 1),
        "tokens/s": round(sum(lengths) / seconds),
        "TFLOP/s": tera(model_flops(PRESETS[line.size], lengths) / seconds),
        "GB": round(memory_gb(device()), 1),
    }
