"""Compare the memory that `esm2mega plan` computes with what six trainings on this CPU take.

    python benchmarks/plan_memory.py

Each training is a job of its own, of one or two processes. A process notes its resident memory before it
builds anything, takes a step, resets the kernel's mark of the peak, takes a second step, and reads the mark.
`MALLOC_MMAP_THRESHOLD_=65536` makes freed tensors leave the process at once; without it the C library keeps
what it may need again, and the figure is of its habits. The mark belongs to Linux.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TRAININGS = {
    "8M fp32": (1, "8M", 4096, ""),
    "8M fp32, recompute full": (1, "8M", 8192, "model.recompute=full"),
    "35M fp32, recompute selective": (1, "35M", 2048, "model.recompute=selective"),
    "35M fp32, TP 2": (
        2,
        "35M",
        2048,
        "parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true",
    ),
    "35M fp32, PP 2": (2, "35M", 2048, "parallel.pipeline_model_parallel_size=2"),
    "35M bf16, DP 2": (2, "35M", 2048, "parallel.distributed_optimizer=true model.precision=bf16"),
}
"""Processes, size, tokens of a micro-batch, and overrides of each training."""

MICRO_BATCHES = 2
LENGTH = 512
MIB = 2**20


def overrides(size: str, tokens: int, words: str, processes: int) -> list[str]:
    data = processes if "distributed" in words else 1
    return [
        f"model.size={size}",
        f"data.max_seq_length={LENGTH}",
        f"train.micro_batch_tokens={tokens}",
        f"train.global_batch_tokens={tokens * MICRO_BATCHES * data}",
        *words.split(),
    ]


def measure(out: str, words: list[str]) -> None:
    """Take two steps as one rank, and write the bytes above the start of each rank."""
    import torch

    from esm2mega.config.load import load_run
    from esm2mega.model.build import build_model
    from esm2mega.parallel.initialize import process_groups
    from esm2mega.plan.stage import example_batch
    from esm2mega.train.losses import MLMLossReduction
    from esm2mega.train.optimizer import train_state
    from esm2mega.train.step import train_step

    run = load_run(None, words)
    with process_groups(run.parallel, run.seed) as ranks:
        warm = torch.randn(64, 64, requires_grad=True)
        (warm @ warm).sum().backward()
        before = status("VmRSS")
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
        state = train_state(run, chunks, MLMLossReduction(), ranks, None)
        batches = [example_batch(run.train.micro_batch_tokens, LENGTH) for _ in range(MICRO_BATCHES)]
        train_step(state, batches)
        Path("/proc/self/clear_refs").write_text("5")
        train_step(state, batches)
        content = {"stage": ranks.pp_rank, "bytes": status("VmHWM") - before}
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(content))


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    from esm2mega.config.load import load_run
    from esm2mega.plan.estimate import estimate

    print("| training | planned, MiB | measured, MiB | planned / measured |\n|---|---|---|---|")
    for name, (processes, size, tokens, extra) in TRAININGS.items():
        words = overrides(size, tokens, extra, processes)
        with tempfile.TemporaryDirectory() as out:
            start = [sys.executable]
            if processes > 1:
                start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            subprocess.run(
                [*start, __file__, "--rank", out, *words],
                check=True,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL,
                timeout=600,
            )
            real = [json.loads(path.read_text()) for path in sorted(Path(out).iterdir())]
        plan = estimate(load_run(None, words), processes, "cpu", None, LENGTH)
        most = max(real, key=lambda rank: rank["bytes"])
        planned = plan.stages[most["stage"]].total
        print(
            f"| {name} | {planned / MIB:.0f} | {most['bytes'] / MIB:.0f} | {planned / most['bytes']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        main()
