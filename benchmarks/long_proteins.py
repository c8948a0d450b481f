"""Embed a proteome with one protein of 34,350 residues, as human titin has, whole: time, memory and disk.

    python benchmarks/long_proteins.py --size tiny --include residue,pooled,contacts
    python benchmarks/long_proteins.py --precision fp64 --context-parallel 4

One command embeds 50 proteins of a FASTA and the long one, which is drawn at random with the frequencies of
their residues. A run of the same command without the long protein stands beside it. For each, the script
notes the seconds of the clock and the peak of the resident memory of its processes (`VmHWM`, which belongs
to Linux), and compares the peak with what `esm2mega embed` said before it computed. With
`MALLOC_MMAP_THRESHOLD_=65536` freed tensors leave the process at once, as in `plan_memory.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"
LENGTH = 34_350
OTHERS = 50
SEED = 1

_NUMBERS = 1 << 22
"""Limits the rows of two outputs that are compared at a time."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(
        description="Memory and time of embedding a proteome with a long protein."
    )
    parser.add_argument(
        "fasta", nargs="?", type=Path, default=DEFAULT_FASTA, help="where the others come from"
    )
    parser.add_argument("--size", default="tiny", help="model, with random weights")
    parser.add_argument("--length", type=int, default=LENGTH, help="residues of the long protein")
    parser.add_argument("--include", default="residue,pooled,contacts", help="as for `esm2mega embed`")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument(
        "--context-parallel",
        type=int,
        default=1,
        metavar="N",
        help="also embed with N processes that share the tokens, and compare what they write",
    )
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    if not options.fasta.exists():
        parser.error(f"no FASTA file at {options.fasta}: name one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = random_model(folder / "model", options.size)
        without, with_long = inputs(options.fasta, folder, options.length)
        results = {}
        for label, fasta in (("without", without), ("with", with_long)):
            results[label] = embed(checkpoint, fasta, folder / f"{label}.h5", options)
            print(f"{label:>8} the long protein: {describe(results[label])}", flush=True)
        if options.context_parallel > 1:
            label, out = f"CP {options.context_parallel}", folder / "parts.h5"
            results[label] = embed(checkpoint, with_long, out, options, options.context_parallel)
            results[label]["difference"] = largest_difference(folder / "with.h5", out)
            print(f"{label:>8} with it:          {describe(results[label])}", flush=True)
            print(f"         largest difference from one process: {results[label]['difference']:.2g}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def random_model(folder: Path, size: str) -> Path:
    """Write a model with random weights, and a contact head of random ones, as Hugging Face stores it."""
    import torch
    from safetensors.torch import load_file, save_file

    from esm2mega.benchmark.random_weights import random_weights
    from esm2mega.config.presets import PRESETS
    from esm2mega.convert.formats import hf

    folder.mkdir()
    hf.write(random_weights(size), folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    weight = tensors["esm.contact_head.regression.weight"]
    assert weight.shape == (1, PRESETS[size].num_layers * PRESETS[size].num_attention_heads)
    tensors["esm.contact_head.regression.weight"] = torch.randn(
        weight.shape, generator=torch.Generator().manual_seed(SEED)
    )
    save_file(tensors, path, {"format": "pt"})
    return folder


def inputs(fasta: Path, folder: Path, length: int) -> tuple[Path, Path]:
    """Write the first proteins of a FASTA, and the same with one more in their midst."""
    records = ["".join(text.split("\n")[1:]) for text in fasta.read_text().split(">")[1 : OTHERS + 1]]
    letters = np.frombuffer("".join(records).encode(), dtype=np.uint8)
    long = np.random.default_rng(SEED).choice(letters, size=length).tobytes().decode()
    paths = folder / "without.fasta", folder / "with.fasta"
    middle = OTHERS // 2
    for path, proteins in zip(paths, (records, [*records[:middle], long, *records[middle:]]), strict=True):
        path.write_text("".join(f">p{n}\n{protein}\n" for n, protein in enumerate(proteins)))
    return paths


def embed(
    checkpoint: Path, fasta: Path, out: Path, options: argparse.Namespace, processes: int = 1
) -> dict[str, object]:
    """Run the command, and return its seconds, the highest peak of its processes, and what it said before."""
    longest = max(options.length + 2, 10_000)
    started, program = [sys.executable, "-c", _PROGRAM], out.with_suffix(".py")
    if processes > 1:
        program.write_text(_PROGRAM)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        started = [*launcher, f"--nproc-per-node={processes}", str(program)]
    command = [
        *started,
        *("embed", str(checkpoint), str(fasta), "--out", str(out)),
        *("--include", options.include, "--precision", options.precision, "--max-seq-length", str(longest)),
        *("--dtype", "fp64" if options.precision == "fp64" else "fp32"),
        f"parallel.context_parallel_size={processes}",
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - began
    if ended.returncode:
        sys.exit(ended.stderr)
    peaks = [int(kilobytes) for kilobytes in re.findall(r"VmHWM (\d+)", ended.stderr)]
    said = re.search(r"about ([\d.]+) GB of memory", ended.stderr)
    assert len(peaks) == processes
    return {
        "seconds": seconds,
        "peak_gb": max(peaks) * 1024 / 1e9,
        "said_gb": None if said is None else float(said[1]),
        "output_gb": out.stat().st_size / 1e9,
    }


def largest_difference(expected: Path, found: Path) -> float:
    """Return the largest difference of two outputs, relative to the largest number of its array."""
    import h5py

    worst = 0.0
    with h5py.File(expected) as first, h5py.File(found) as second:
        names: list[str] = []
        first.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            if first[name].dtype.kind != "f":
                continue
            largest = difference = 0.0
            for start in range(0, len(first[name]), _NUMBERS):
                ours, theirs = (file[name][start : start + _NUMBERS] for file in (first, second))
                largest = max(largest, float(np.abs(ours).max()))
                difference = max(difference, float(np.abs(ours - theirs).max()))
            worst = max(worst, difference / largest)
    return worst


def describe(result: dict[str, object]) -> str:
    """Return a result as a line."""
    said = "" if result["said_gb"] is None else f" (said before: {result['said_gb']:.1f})"
    return (
        f"{result['seconds']:,.0f} s, peak {result['peak_gb']:.2f} GB{said}, "
        f"output {result['output_gb']:.2f} GB"
    )


_PROGRAM = """
import sys
from pathlib import Path
from esm2mega.cli.app import main
code = main(sys.argv[1:])
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        # At once, since the ranks of torchrun write without buffers, between one another's words.
        sys.stderr.write(f"VmHWM {line.split()[1]}\\n")
sys.exit(code)
"""


if __name__ == "__main__":
    main()
