"""Time and memory of verifying a checkpoint, beside those of loading it, for random weights of any size.

    python benchmarks/verification.py --size 650M --folder /big/disk --json result.json

Every step is a process of its own, once with the files out of the page cache of the system (`cold`) and once
with them in it (`warm`). Loading reads every tensor into memory, in one pass. The peak is the largest
resident set of the process, above that of an interpreter that imports and does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from esm2mega.benchmark.random_weights import random_weights
from esm2mega.config.presets import PRESETS
from esm2mega.convert.formats import esm2mega as own_format

ROOT = Path(__file__).parents[1]
MB = 10**6

_TIMED = """
import sys, time
from pathlib import Path
import torch, megatron.core
from esm2mega.checkpoint.digests import digest_files, read_digests, verify
from esm2mega.checkpoint.tensors import TensorReader
checkpoint = Path(sys.argv[1])
begun = time.perf_counter()
{}
print("seconds", time.perf_counter() - begun)
"""

STEPS = {
    "interpreter": "",
    "load": "reader = TensorReader(checkpoint); tensors = reader.read_many(reader.index)",
    "verify": "verify(checkpoint, read_digests(checkpoint))",
    "digest at save": "digest_files(checkpoint, list(read_digests(checkpoint)))",
}
"""What is timed, as Python."""


def write_checkpoint(path: Path, size: str) -> int:
    """Write random fp32 weights, and return the bytes of all files."""
    path.mkdir()
    own_format.write(random_weights(size), path)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget the pages of all files below a directory."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(step: str, checkpoint: Path, cold: bool) -> tuple[float, int]:
    """Return the seconds of a step and the peak of its process in bytes."""
    if cold:
        drop_from_cache(checkpoint)
    command = [sys.executable, "-Wignore", "-c", _TIMED.format(STEPS[step]), str(checkpoint)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = re.search(r"seconds (\S+)", said)
    if process.returncode or found is None:
        raise SystemExit(f"{step} ended with exit code {process.returncode}")
    return float(found[1]), usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(PRESETS), default="650M")
    parser.add_argument("--folder", type=Path, help="for the files meanwhile [default: that of the system]")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="verification_") as folder:
        checkpoint = Path(folder).resolve() / "checkpoint"
        num_bytes = write_checkpoint(checkpoint, arguments.size)
        measured = {
            (step, cache): run(step, checkpoint, cache == "cold")
            for cache in ("cold", "warm")
            for step in STEPS
        }
    print(f"{arguments.size}: {num_bytes / MB:.0f} MB in fp32, {torch.__version__}, {os.cpu_count()} cores")
    idle = min(measured["interpreter", cache][1] for cache in ("cold", "warm"))
    for (step, cache), (seconds, peak) in measured.items():
        if step != "interpreter":
            ratio = seconds / measured["load", cache][0]
            print(
                f"{step:<15} {cache}: {seconds:6.2f} s, {num_bytes / MB / seconds:6.0f} MB/s, {ratio:5.2f} "
                f"of loading, peak {(peak - idle) / MB:6.0f} MB above the interpreter"
            )
    if arguments.json:
        rows = [
            {"step": step, "cache": cache, "seconds": seconds, "peak_bytes": peak}
            for (step, cache), (seconds, peak) in measured.items()
        ]
        figures = {"size": arguments.size, "bytes": num_bytes, "steps": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
