"""Asks the processor what it is and which instructions it has, without importing torch."""

from __future__ import annotations

import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
"""Is where Linux describes the processor; elsewhere no instructions are known."""

BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Names the instructions that multiply bf16: of x86 two kinds, and of ARM."""

INT8 = ("amx_int8", "avx512_vnni", "avx_vnni")
"""Names the instructions of x86 that multiply int8 and add in 32 bits."""


def instructions(names: tuple[str, ...]) -> list[str]:
    """Return those of `names` that the processor has, in order."""
    flags = set(_text().split())
    return [name for name in names if name in flags]


def model_name() -> str:
    """Return the name of the processor."""
    for line in _text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def identity() -> str:
    """Return what tells processors apart: a cluster may share one cache among machines that differ."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = dict.fromkeys(line for line in _text().splitlines() if line.startswith(wanted))
    return "\n".join((platform.machine(), *lines) if lines else (platform.machine(), platform.processor()))


def _text() -> str:
    try:
        return CPU_INFO.read_text()
    except OSError:
        return ""
