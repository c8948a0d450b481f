"""Peak memory and time per step of training everything, adapters, or the head alone, side by side.

    python benchmarks/finetune_memory.py --size 8M --json result.json

    full     all weights
    lora     adapters of rank `--rank` on q, k and v
    frozen   the masked-language-model head alone

Each mode trains in a process of its own, through the step of `esm2mega pretrain`, on the same packs of
random residues. Memory is what the process needed at its peak beyond what it had before the model was built:
on a CPU of its resident memory, on a GPU of the allocator's. The first step, which allocates the optimizer's
state, counts for memory and not for time; the time is the median over the others, and beside it the mean of
what all threads of the process took, which other programs disturb less. `trained` counts parameters,
`checkpoint` is the size of what a run would save, optimizer included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODES = ("full", "lora", "frozen")


def measure(mode: str, options: argparse.Namespace, answer: Any) -> None:
    """Train in `mode` and put the figures into the queue `answer`."""
    import torch

    from esm2mega.checkpoint.store import save_checkpoint
    from esm2mega.config.load import load_run
    from esm2mega.lora.inject import apply_lora, freeze
    from esm2mega.model.build import build_model
    from esm2mega.parallel.initialize import process_groups
    from esm2mega.train.losses import MLMLossReduction
    from esm2mega.train.optimizer import build_optimizer, build_schedule, wrap_data_parallel
    from esm2mega.train.step import TrainState, train_step

    torch.set_num_threads(options.threads)
    run = load_run(
        None,
        [
            f"model.size={options.size}",
            f"model.precision={options.precision}",
            f"model.recompute={options.recompute}",
            f"lora.rank={options.rank}",
            "schedule.warmup_steps=0",
        ],
    )
    with process_groups(run.parallel, run.seed) as ranks, tempfile.TemporaryDirectory() as folder:
        before = _memory_bytes(ranks.device)
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed, adapted=mode == "lora")
        if mode == "lora":
            apply_lora(chunks, run.lora, run.seed)
        elif mode == "frozen":
            freeze(chunks, ("lm_head.",))
        model = wrap_data_parallel(chunks, run.model, run.parallel)
        optimizer = build_optimizer(run.optim, run, model)
        schedule = build_schedule(run.schedule, run.optim, optimizer)
        state = TrainState(model, optimizer, schedule, MLMLossReduction(), ranks.device)
        batch = _batch(options)
        seconds: list[float] = []
        for _ in range(options.steps + 1):
            if len(seconds) == 1:
                first_cpu = time.process_time()
            begin = time.perf_counter()
            train_step(state, [batch])
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        cpu_seconds = (time.process_time() - first_cpu) / options.steps
        peak = _memory_bytes(ranks.device) - before
        directory = Path(folder) / "step"
        save_checkpoint(directory, model, optimizer, run, {}, trained_only=mode != "full")
        answer.put(
            {
                "device": str(ranks.device),
                "peak_memory_gb": peak / 1e9,
                "step_seconds": statistics.median(seconds[1:]),
                "cpu_seconds": cpu_seconds,
                "trained_parameters": sum(
                    p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad
                ),
                "checkpoint_mb": sum(path.stat().st_size for path in directory.rglob("*")) / 1e6,
            }
        )


def _batch(options: argparse.Namespace) -> Any:
    """A pack of equally long proteins of random residues, 15 % of which are predicted."""
    import torch

    from esm2mega.data.loader import PackedBatch
    from esm2mega.data.tokenizer import MASK

    count, length = options.tokens // options.length, options.length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 24, (count * length,), generator=generator)
    positions = torch.nonzero(torch.rand(count * length, generator=generator) < 0.15).flatten()
    labels = ids[positions].clone()
    ids[positions] = MASK
    return PackedBatch(
        input_ids=ids,
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * length,
        seqlens=[length] * count,
        max_seqlen=length,
        label_positions=positions,
        labels=labels,
        label_counts=torch.bincount(positions // length, minlength=count).tolist(),
        num_tokens=count * length,
        num_residues=count * (length - 2),
        num_sequences=count,
    )


def _memory_bytes(device: Any) -> int:
    """The largest so far."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # In units of 1024 bytes on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="8M", help="preset of the model")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack, which is a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a protein")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    if options.tokens < options.length:
        raise SystemExit(f"--tokens {options.tokens} is less than --length {options.length}")
    # A fresh process each: memory that one mode touched would count for the next.
    context = multiprocessing.get_context("spawn")
    figures = {}
    print(f"{'mode':8}{'peak GB':>10}{'s/step':>10}{'CPU s/step':>12}{'trained':>14}{'checkpoint MB':>16}")
    for mode in MODES:
        answer = context.Queue()
        process = context.Process(target=measure, args=(mode, options, answer))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{mode}: the process ended with code {process.exitcode}")
        row = figures[mode] = answer.get()
        print(
            f"{mode:8}{row['peak_memory_gb']:10.3f}{row['step_seconds']:10.3f}{row['cpu_seconds']:12.3f}"
            f"{row['trained_parameters']:14,}{row['checkpoint_mb']:16.1f}",
            flush=True,
        )
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        content = {"machine": platform.platform(), "settings": settings, "modes": figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
