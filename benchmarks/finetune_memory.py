"""Peak memory and time per step of fine-tuning everything, adapters, or the head alone, side by side.

    python benchmarks/finetune_memory.py --size 8M --json result.json

    full     all weights
    lora     adapters of rank `--rank` on q, k and v, and the head
    frozen   the head alone; the encoder computes each protein once

Each mode trains in a process of its own, through the step of `esm2mega finetune`: a regression by the default
head on the same labelled proteins of random residues, in two passes of `--steps` steps over them. Memory is
what the process needed at its peak beyond what it had before the model was built: on a CPU of its resident
memory, on a GPU of the allocator's. The first step, which allocates the optimizer's state, counts for memory
and not for time. Times are medians over the steps of the first and of the second pass, which differ where
features are kept; beside them the mean of what all threads of the process took in the second, which other
programs disturb less. `trained` counts parameters, `checkpoint` is the size of what a run would save,
optimizer included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
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

    from esm2mega.checkpoint.saver import Saver
    from esm2mega.checkpoint.tensor_filter import ALL, TRAINED
    from esm2mega.config.load import load_run
    from esm2mega.data.labels.dataset import proteins_of_pairs
    from esm2mega.data.labels.stream import LabelledStream
    from esm2mega.finetune.losses import loss_of_task
    from esm2mega.finetune.param_groups import set_trainable
    from esm2mega.finetune.run import train_spec
    from esm2mega.lora.inject import apply_lora
    from esm2mega.model.build import build_model
    from esm2mega.model.heads import head_of_task
    from esm2mega.parallel.initialize import process_groups
    from esm2mega.train.optimizer import train_state
    from esm2mega.train.step import train_step

    torch.set_num_threads(options.threads)
    run = load_run(
        None,
        [
            f"model.size={options.size}",
            f"model.precision={options.precision}",
            f"model.recompute={options.recompute}",
            "task.kind=regression",
            f"finetune.mode={mode}",
            f"lora.rank={options.rank}",
            f"data.max_seq_length={options.length}",
            f"train.micro_batch_tokens={options.tokens}",
            f"train.global_batch_tokens={options.tokens}",
            # Each pass over the proteins is a whole number of packs.
            f"data.pack_window={options.tokens // options.length}",
            "schedule.warmup_steps=0",
        ],
    )
    proteins, info = proteins_of_pairs(_pairs(options), run.task, None, "pairs")
    with process_groups(run.parallel, run.seed) as ranks, tempfile.TemporaryDirectory() as folder:
        before = _memory_bytes(ranks.device)
        head = head_of_task(run.task, info.num_outputs)
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed, head, has_lora=mode == "lora")
        if mode == "lora":
            apply_lora(chunks, run.lora, run.seed, lambda name: name.startswith("head."))
        else:
            set_trainable(chunks, run.finetune)
        state = train_state(run, chunks, loss_of_task(run.task, info), ranks, None)
        seconds: list[float] = []
        with LabelledStream(proteins, train_spec(run.data, run.train, run.seed, proteins)) as stream:
            for _ in range(2 * options.steps):
                if len(seconds) == options.steps:
                    first_cpu = time.process_time()
                batch = next(stream)
                begin = time.perf_counter()
                train_step(state, [batch])
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
        cpu_seconds = (time.process_time() - first_cpu) / options.steps
        peak = _memory_bytes(ranks.device) - before
        directory = Path(folder) / "step"
        saved = TRAINED if mode == "lora" else ALL
        Saver().save(directory, state.model, state.optimizer, run, {}, tensor_filter=saved)
        answer.put(
            {
                "device": str(ranks.device),
                "peak_memory_gb": peak / 1e9,
                "first_seconds": statistics.median(seconds[1 : options.steps] or seconds[:1]),
                "step_seconds": statistics.median(seconds[options.steps :]),
                "cpu_seconds": cpu_seconds,
                "trained_parameters": sum(
                    p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad
                ),
                "checkpoint_mb": sum(path.stat().st_size for path in directory.rglob("*")) / 1e6,
            }
        )


def _pairs(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Equally long proteins of random residues, as many as fill a pack for each step of a pass."""
    draw = random.Random(1)
    count = options.steps * (options.tokens // options.length)
    sequences = ["".join(draw.choices("LAGVSERTIDPKQNFYMHWC", k=options.length - 2)) for _ in range(count)]
    return [(sequence, draw.gauss(0, 1)) for sequence in sequences]


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
    parser.add_argument("--steps", type=int, default=5, help="of a pass, of which there are two")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    if options.tokens < options.length:
        raise SystemExit(f"--tokens {options.tokens} is less than --length {options.length}")
    # A process each, forked from one that has only imported: memory that one mode touched would count for the
    # next.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["esm2mega.finetune.run", "esm2mega.lora.inject"])
    figures = {}
    print(
        f"{'mode':8}{'peak GB':>10}{'s/step, 1st':>13}{'2nd pass':>10}{'CPU s/step':>12}{'trained':>14}"
        f"{'checkpoint MB':>16}"
    )
    for mode in MODES:
        answer = context.Queue()
        process = context.Process(target=measure, args=(mode, options, answer))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{mode}: the process ended with code {process.exitcode}")
        row = figures[mode] = answer.get()
        print(
            f"{mode:8}{row['peak_memory_gb']:10.3f}{row['first_seconds']:13.3f}{row['step_seconds']:10.3f}"
            f"{row['cpu_seconds']:12.3f}{row['trained_parameters']:14,}{row['checkpoint_mb']:16.1f}",
            flush=True,
        )
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        content = {"machine": platform.platform(), "settings": settings, "modes": figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
