"""Describes the machine and the versions that figures were measured with, and waits for its device."""

from __future__ import annotations

import os
import platform
from typing import Any

import psutil
import torch

from esm2mega.doctor.packages import installed_version
from esm2mega.processor import model_name

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "fair-esm",
    "esm-cpp",
    "transformer-engine",
    "flash-attn",
)


def device() -> torch.device:
    """Return the device that this process trains on."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def synchronize() -> None:
    """Wait until the device has done what it was asked to; a CPU has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def conditions() -> dict[str, Any]:
    """Return what a reader needs to judge a figure: device, memory, threads, versions."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "device_gb": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None,
        "processor": model_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": psutil.virtual_memory().total / 2**30,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed_version(name)) is not None},
        "cuda": torch.version.cuda,
    }
