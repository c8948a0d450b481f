"""Training steps on a GPU: their rate, what they wait for, where their time goes, and those of a peer."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from batches import by_padded_tokens, pack, pad, padded_tokens, random_proteins
from esm2mega_model import training
from gpu_lines import Line
from gpu_timing import SEED, Row, device, figures_of_steps, milliseconds, protein_lengths, synchronize
from hf_model import config_of
from megatron.core.utils import unwrap_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from esm2mega.batch import PackedBatch
from esm2mega.train.step import train_step


def micro_batches(line: Line, count: int | None = None) -> list[PackedBatch]:
    """Return packs, each of as many tokens as the line asks for: `count` of them, or those of a step."""
    seeds = range(SEED, SEED + (line.micro_batches if count is None else count))
    return [pack(random_proteins(protein_lengths(line, seed), seed)) for seed in seeds]


def syncs(line: Line, folder: Path) -> Iterator[Row]:
    """Count where the host waits for the device in a training step; a CPU has nothing to wait for."""
    with training(line.size, line.changes) as state:
        batches = micro_batches(line)
        for _ in range(line.warm_up):
            train_step(state, batches)
        places = waits_of(lambda: train_step(state, batches))
    for place, times in sorted(places.items()):
        yield {"place": place, "times/step": times}
    yield {"place": f"all, {line.micro_batches} micro-batches", "times/step": places.total()}


def waits_of(work: Callable[[], object]) -> Counter[str]:
    """Count by file and line the operations of `work` that PyTorch reports to synchronize host and device."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}"
        for one in caught
        if "synchronizing CUDA operation" in str(one.message)
    )


def train(line: Line, folder: Path) -> Iterator[Row]:
    """Time whole optimizer steps of pretraining."""
    with training(line.size, line.changes) as state:
        batches = micro_batches(line)
        times = milliseconds(lambda: train_step(state, batches), line)
        (model,) = unwrap_model(state.model)
        lengths = [length for batch in batches for length in batch.seqlens]
        yield {
            **figures_of_steps(line, lengths, times),
            "micro-batches": line.micro_batches,
            "attention": model.config.packed_attention,
            "recompute": line.recompute,
        }


def profile(line: Line, folder: Path) -> Iterator[Row]:
    """Say which kernels a step spends its time in, and how long the device is idle."""
    on_gpu = device().type == "cuda"
    with training(line.size, line.changes) as state:
        batches = micro_batches(line)
        (step,) = milliseconds(lambda: train_step(state, batches), line)[-1:]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with record(activities=activities) as recorded:
            train_step(state, batches)
            synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # An annotation spans kernels, which would count twice.
    kernels = [
        event
        for event in recorded.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    # In microseconds.
    times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in kernels}
    busy = sum(times.values()) / 1e3
    yield {
        "kernel": f"all; a step without the profiler takes {step:.1f} ms",
        "calls": sum(event.count for event in kernels),
        "ms": round(busy, 2),
        "share": 1.0,
    }
    for event in sorted(kernels, key=lambda event: -times[event.key])[:20]:
        ms = times[event.key] / 1e3
        yield {
            "kernel": event.key[:70],
            "calls": event.count,
            "ms": round(ms, 2),
            "share": round(ms / busy, 3),
        }


def hugging_face(line: Line, folder: Path) -> Iterator[Row]:
    """Time the same steps with `EsmForMaskedLM` under autocast to bf16, on padded batches.

    The proteins are sorted by length before they are divided among batches, so that little is padding.
    """
    from transformers import EsmForMaskedLM

    torch.manual_seed(SEED)
    model = EsmForMaskedLM(config_of(line.size)).to(device()).train()
    model.set_attn_implementation("sdpa")
    if line.compiled:
        # Building kernels takes a minute on a CPU, for which there is nothing to learn from them.
        model.compile(backend="inductor" if device().type == "cuda" else "eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=True)
    lengths = [n for number in range(line.micro_batches) for n in protein_lengths(line, SEED + number)]
    proteins = sorted(random_proteins(lengths, SEED), key=lambda protein: len(protein.input_ids))
    batches = by_padded_tokens(line.tokens)(proteins)
    padded = [[tensor.to(device()) for tensor in pad(batch)] for batch in batches]

    def step() -> None:
        optimizer.zero_grad()
        for input_ids, attention_mask, labels in padded:
            with torch.autocast(device().type, dtype=torch.bfloat16):
                output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    times = milliseconds(step, line)
    yield {
        **figures_of_steps(line, lengths, times),
        "micro-batches": len(batches),
        "computed/real": round(padded_tokens(batches) / sum(lengths), 2),
        "compiled": line.compiled,
    }
