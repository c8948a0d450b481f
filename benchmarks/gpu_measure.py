"""One line of `gpu.py` in this process: `python benchmarks/gpu_measure.py NAME FOLDER [--reduced]`.

The rows that it measured are written to `FOLDER/NAME.json`; `conditions` in the place of a name writes what a
reader needs to judge all others. Lines that are compared leave their gradients and weights in the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_parity
import gpu_steps
import torch
from batches import random_residues
from gpu_lines import Line, choose_lines
from gpu_timing import SEED, Row, device, milliseconds, protein_lengths, tera
from infer_throughput import esm2mega

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "flash-attn")


def peaks(line: Line, folder: Path) -> Iterator[Row]:
    """Measure what products of matrices and copies reach here: a large product, and those of a 650M layer."""
    on_cpu = device().type == "cpu"
    t, h, n = (64, 32, 128) if on_cpu else (16384, 1280, 8192)
    for m, k, columns in ((n, n, n), (t, h, 3 * h), (t, h, h), (t, h, 4 * h), (t, 4 * h, h)):
        a = torch.randn(m, k, device=device(), dtype=torch.bfloat16)
        b = torch.randn(k, columns, device=device(), dtype=torch.bfloat16)
        seconds = statistics.median(milliseconds(lambda a=a, b=b: a @ b, line)) / 1e3
        yield {
            "what": f"bf16 [{m}, {k}] x [{k}, {columns}]",
            "TFLOP/s": tera(2 * m * k * columns / seconds),
        }
    source = torch.empty(2**20 if on_cpu else 2**30, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    seconds = statistics.median(milliseconds(lambda: target.copy_(source), line)) / 1e3
    yield {
        "what": f"copy of {source.numel() // 2**20} MiB, read and written",
        "TB/s": tera(2 * source.numel() / seconds),
    }


def embed(line: Line, folder: Path) -> Iterator[Row]:
    """Time `esm2mega embed` without its files: proteins in, the last layer's vector of each residue out."""
    lengths = [n for number in range(line.micro_batches) for n in protein_lengths(line, SEED + number)]
    with esm2mega([random_residues(lengths, SEED)], line.size, line.precision) as one_pass:
        times = milliseconds(one_pass, line)
    yield {
        "size": line.size,
        "precision": line.precision,
        "tokens": sum(lengths),
        "ms": round(statistics.median(times), 1),
        "fastest": round(min(times), 1),
        "slowest": round(max(times), 1),
        "tokens/s": round(1e3 * sum(lengths) / statistics.median(times)),
    }


MEASUREMENTS: dict[str, Callable[[Line, Path], Iterator[Row]]] = {
    "peaks": peaks,
    "parity": gpu_parity.parity,
    "syncs": gpu_steps.syncs,
    "train": gpu_steps.train,
    "profile": gpu_steps.profile,
    "hugging_face": gpu_steps.hugging_face,
    "embed": embed,
}


def conditions() -> Row:
    """Return device, versions and threads: figures of two conditions do not belong into one table."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "none",
        "GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30) if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout, with a `+` behind it where files have changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    """Measure what the command line names, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reduced", action="store_true")
    options = parser.parse_args()
    if options.name == "conditions":
        rows = [conditions()]
    else:
        (line,) = (one for one in choose_lines([options.name], options.reduced) if one.name == options.name)
        rows = list(MEASUREMENTS[line.measurement](line, options.folder))
    (options.folder / f"{options.name}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
