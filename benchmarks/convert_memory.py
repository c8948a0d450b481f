"""Peak memory of converting from Hugging Face to esm2mega and back, for a random checkpoint of any size.

    python benchmarks/convert_memory.py --size 650M --folder /big/disk --json result.json

Each step is a process of its own; its peak is the largest resident set that the kernel saw, the figure of
`/usr/bin/time -v`. Beside it stands that of an interpreter that imports and converts nothing. Every file is
removed as soon as it is not needed: the disk must hold the weights twice. The tensors that come back
must be those of the source, byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from esm2mega.benchmark.random_weights import random_weights
from esm2mega.config.presets import PRESETS
from esm2mega.convert.formats import hf

ROOT = Path(__file__).parents[1]
MB = 10**6
INTERPRETER = "import torch, megatron.core, esm2mega"


def write_source(path: Path, size: str) -> int:
    """A random fp32 model of this size as transformers stores it; returns the bytes of its tensors."""
    path.mkdir()
    hf.write(random_weights(size), path)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors."""
    result = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest = hashlib.sha256()
            while block := opened.read(1 << 24):
                digest.update(block)
        result[file.name] = digest.hexdigest()
    return result


def peak_bytes(*arguments: str | Path) -> int:
    """Run Python with these arguments; the largest resident set of that process."""
    command = [sys.executable, "-Wignore", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with exit code {process.returncode}")
    return usage.ru_maxrss * 1024


def measure(size: str, folder: Path, pickled: bool) -> dict[str, int]:
    """All steps; peaks and the bytes of the source. With `pickled` also from Hugging Face to fair-esm."""
    source, ours, back = folder / "hf", folder / "ours", folder / "back"
    convert = ("-m", "esm2mega", "convert")
    interpreter = peak_bytes("-c", INTERPRETER)
    num_bytes, before = write_source(source, size), checksums(source)
    steps = {}
    if pickled:
        target = folder / "pickled" / "esm2_x.pt"
        steps["hf_to_fair_esm"] = peak_bytes(*convert, source, target, "--to", "fair-esm")
        shutil.rmtree(target.parent)
    there = peak_bytes(*convert, source, ours, "--to", "esm2mega")
    shutil.rmtree(source)
    again = peak_bytes(*convert, ours, back, "--to", "hf")
    shutil.rmtree(ours)
    if checksums(back) != before:
        raise SystemExit("the tensors that came back are not those of the source")
    shutil.rmtree(back)
    return {
        "source_bytes": num_bytes,
        "interpreter": interpreter,
        "hf_to_esm2mega": there,
        "esm2mega_to_hf": again,
        **steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(PRESETS), default="650M")
    parser.add_argument("--folder", type=Path, help="for the files meanwhile [default: that of the system]")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--pickled", action="store_true", help="also to fair-esm, whose file is written from memory"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert_memory_") as folder:
        result = measure(arguments.size, Path(folder).resolve(), arguments.pickled)
    total = result.pop("source_bytes")
    print(f"{arguments.size}: {total / MB:.0f} MB of fp32 tensors")
    print(f"interpreter ({INTERPRETER}): {result['interpreter'] / MB:.0f} MB")
    interpreter = result["interpreter"]
    for step, peak in result.items():
        if step == "interpreter":
            continue
        above = peak - interpreter
        print(f"{step}: {peak / MB:.0f} MB, {above / MB:.0f} MB above it, {above / total:.1%} of the file")
    if arguments.json:
        figures = {"size": arguments.size, "source_bytes": total, "peak_bytes": result}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
