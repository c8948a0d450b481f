"""Compute one long protein, forward and backward, with 1, 2 and 4 processes that share its tokens.

    python benchmarks/context_parallel.py --size 8M --tokens 16384

Each row is a job of its own. A process notes its resident memory when it has the model, computes loss and
gradients of a protein that fills the pack, and reads the kernel's mark of the peak (`VmHWM`, which belongs to
Linux). Beside the highest of its ranks stands what `esm2mega plan` computes for the activations.
`MALLOC_MMAP_THRESHOLD_=65536` makes freed tensors leave the process at once, as in `plan_memory.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure and print a table."""
    parser = argparse.ArgumentParser(description="Memory and time of a long protein in parts.")
    parser.add_argument("--size", default="8M", help="model, with random weights")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the protein and of the pack")
    parser.add_argument("--parts", default="1,2,4", help="context-parallel sizes")
    parser.add_argument("--exchange", default="auto", help="parallel.context_parallel_exchange")
    parser.add_argument("--recompute", default="none", help="model.recompute")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options, words = parser.parse_known_args(arguments)
    if options.rank is not None:
        measure(options.rank, words)
        return
    print("| context-parallel size | planned, MiB | measured, MiB | planned / measured | seconds |")
    print("|---|---|---|---|---|")
    for size in map(int, options.parts.split(",")):
        print(row(size, options), flush=True)


def row(size: int, options: argparse.Namespace) -> str:
    """Run a job of `size` processes, and return its row."""
    from esm2mega.config.load import load_run
    from esm2mega.plan.estimate import estimate

    words = [
        *(f"model.size={options.size}", f"model.recompute={options.recompute}"),
        *(f"data.max_seq_length={options.tokens}", f"train.micro_batch_tokens={options.tokens}"),
        *(f"train.global_batch_tokens={options.tokens}", f"parallel.context_parallel_size={size}"),
        f"parallel.context_parallel_exchange={options.exchange}",
    ]
    start = [sys.executable]
    if size > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [*start, __file__, "--rank", out, *words],
            check=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        found = [json.loads(path.read_text()) for path in Path(out).iterdir()]
    assert len(found) == size
    measured, seconds = (max(rank[name] for rank in found) for name in ("bytes", "seconds"))
    planned = estimate(load_run(None, words), size, "cpu", None, options.tokens).stages[0].activations
    numbers = f"{planned / MIB:,.0f} | {measured / MIB:,.0f} | {planned / measured:.2f} | {seconds:,.0f}"
    return f"| {size} | {numbers} |"


def measure(out: str, words: list[str]) -> None:
    """Compute loss and gradients as one rank, and write its seconds, and its bytes above the model's."""
    import torch

    from esm2mega.config.load import load_run
    from esm2mega.model.build import build_model
    from esm2mega.parallel.initialize import process_groups
    from esm2mega.plan.stage import example_batch
    from esm2mega.train.losses import MLMLossReduction
    from esm2mega.train.optimizer import train_state
    from esm2mega.train.step import run_schedule

    run = load_run(None, words)
    with process_groups(run.parallel, run.seed) as ranks:
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
        state = train_state(run, chunks, MLMLossReduction(), ranks, None)
        for chunk in state.model:
            chunk.zero_grad_buffer()
        warm = torch.randn(64, 64, requires_grad=True)
        (warm @ warm).sum().backward()
        # Short, so that what is made once is there: compiled kernels, connections, buffers of the exchange.
        run_schedule(state.model, state.loss, [example_batch(256, 256)], ranks.device, forward_only=False)
        batch = example_batch(run.train.micro_batch_tokens, run.train.micro_batch_tokens)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        run_schedule(state.model, state.loss, [batch], ranks.device, forward_only=False)
        content = {"bytes": status("VmHWM") - before, "seconds": time.perf_counter() - began}
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(content))


def status(name: str) -> int:
    """Return a size that the kernel tells of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
