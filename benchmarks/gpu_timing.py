"""What the measurements of `gpu.py` share: device, clock, lengths of proteins, and products of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu_lines import Line

from esm2mega.benchmark.machine import device, synchronize
from esm2mega.benchmark.products import model_flops
from esm2mega.benchmark.proteins import uniref_lengths
from esm2mega.config.presets import PRESETS
from esm2mega.train.throughput import memory_gb

Row = dict[str, Any]
"""Figures of a measurement by the heading of their column; None where there is none on this device."""

SEED = 1


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
