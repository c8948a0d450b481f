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
from pathlib import Path

import gpu_parity
import gpu_steps
import torch
from gpu_lines import Line, choose_lines
from gpu_timing import SEED, Row, milliseconds, protein_lengths, tera

from esm2mega.benchmark.machine import PACKAGES, device
from esm2mega.benchmark.ours import embedding_pass
from esm2mega.benchmark.peers import hf_embedding
from esm2mega.benchmark.products import DTYPES, copy, forward_flops, product
from esm2mega.benchmark.proteins import extract_batches, random_residues
from esm2mega.benchmark.turns import Pass
from esm2mega.config.presets import PRESETS
from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.doctor.packages import installed_version
from esm2mega.errors import UserError
from esm2mega.model.kernels.fp8 import check_fp8
from esm2mega.model.layer_spec import choose_layer_spec
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.throughput import memory_gb


def peaks(line: Line, folder: Path) -> Iterator[Row]:
    """Measure what products of matrices and copies reach here: large products, and those of a 650M layer."""
    on_cpu = device().type == "cpu"
    t, h, n = (64, 32, 128) if on_cpu else (16384, 1280, 8192)
    layer = ((t, h, 3 * h), (t, h, h), (t, h, 4 * h), (t, 4 * h, h))
    for precision, shapes in (("bf16", ((n, n, n), *layer)), ("fp32", ((n, n, n),))):
        for m, k, columns in shapes:
            work = product(m, k, columns, DTYPES[precision], device())
            seconds = statistics.median(milliseconds(work.run, line)) / 1e3
            yield {
                "what": f"{precision} [{m}, {k}] x [{k}, {columns}]",
                "TFLOP/s": tera(work.units / seconds),
            }
    size = 2**20 if on_cpu else 2**30
    work = copy(size, device())
    seconds = statistics.median(milliseconds(work.run, line)) / 1e3
    yield {"what": f"copy of {size // 2**20} MiB, read and written", "TB/s": tera(work.units / seconds)}


def embed(line: Line, folder: Path) -> Iterator[Row]:
    """Time `esm2mega embed` without its files: proteins in, the last layer's vector of each residue out."""
    lengths = _embedded_lengths(line)
    with process_groups(ParallelConfig(), seed=SEED) as ranks:
        work = embedding_pass(line.size, line.precision, random_residues(lengths, SEED), ranks)
        yield _figures_of_embedding(line, lengths, work)


def embed_hugging_face(line: Line, folder: Path) -> Iterator[Row]:
    """Time the same with Hugging Face's `EsmModel`, on batches padded to their longest, sorted by length."""
    lengths = _embedded_lengths(line)
    proteins = random_residues(lengths, SEED)
    batches = [[proteins[i] for i in batch] for batch in extract_batches([n - 2 for n in lengths])]
    yield _figures_of_embedding(line, lengths, hf_embedding(batches, line.size, line.precision, device()))


def _embedded_lengths(line: Line) -> list[int]:
    return [n for number in range(line.micro_batches) for n in protein_lengths(line, SEED + number)]


def _figures_of_embedding(line: Line, lengths: list[int], work: Pass) -> Row:
    times = milliseconds(work.run, line)
    seconds = statistics.median(times) / 1e3
    return {
        "size": line.size,
        "precision": line.precision,
        "tokens": sum(lengths),
        "ms": round(1e3 * seconds, 1),
        "fastest": round(min(times), 1),
        "slowest": round(max(times), 1),
        "tokens/s": round(sum(lengths) / seconds),
        "TFLOP/s": tera(forward_flops(PRESETS[line.size], lengths, has_logits=False) / seconds),
        "GB": round(memory_gb(device()), 1),
        "computed/real": round(work.computed, 2),
    }


MEASUREMENTS: dict[str, Callable[[Line, Path], Iterator[Row]]] = {
    "peaks": peaks,
    "parity": gpu_parity.parity,
    "twice": gpu_parity.twice,
    "syncs": gpu_steps.syncs,
    "train": gpu_steps.train,
    "profile": gpu_steps.profile,
    "hugging_face": gpu_steps.hugging_face,
    "embed": embed,
    "embed_hugging_face": embed_hugging_face,
}


def conditions() -> Row:
    """Return device, versions and threads: figures of two conditions do not belong into one table."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "none",
        "GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30) if on_gpu else None,
        "fp8": _has_fp8(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{package: installed_version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _has_fp8() -> bool:
    """Return whether the lines in FP8 can run here."""
    try:
        check_fp8(ModelConfig(fp8="hybrid"), choose_layer_spec("auto", device(), torch.bfloat16), device())
    except UserError:
        return False
    return True


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
