"""Training steps on a GPU: their rate, what they wait for, where their time goes, and those of a peer."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_lines import Line
from gpu_timing import SEED, Row, figures_of_steps, milliseconds, protein_lengths
from megatron.core.utils import unwrap_model

from esm2mega.batch import PackedBatch
from esm2mega.benchmark.batches import by_padded_tokens, pack, padded_tokens, random_proteins
from esm2mega.benchmark.machine import device
from esm2mega.benchmark.ours import training
from esm2mega.benchmark.peers import HuggingFaceTrainer
from esm2mega.benchmark.products import DTYPES
from esm2mega.benchmark.profile import operations_of
from esm2mega.model.layer_spec import choose_layer_spec
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
            "layers": _layers(line),
            "fp8": line.fp8,
            "recompute": line.recompute,
            "compiled": line.compiled,
        }


def _layers(line: Line) -> str:
    """Return whose layers a line trains: those of Transformer Engine are not compiled."""
    asked = "local" if line.compiled else line.layer_spec
    return choose_layer_spec(asked, device(), DTYPES[line.precision])


def profile(line: Line, folder: Path) -> Iterator[Row]:
    """Say which kernels a step spends its time in, and how long the device is idle."""
    with training(line.size, line.changes) as state:
        batches = micro_batches(line)
        (step,) = milliseconds(lambda: train_step(state, batches), line)[-1:]
        operations = operations_of(lambda: train_step(state, batches))
    busy = sum(one.seconds for one in operations)
    yield {
        "kernel": f"all; a step without the profiler takes {step:.1f} ms",
        "calls": sum(one.calls for one in operations),
        "ms": round(1e3 * busy, 2),
        "share": 1.0,
    }
    for one in operations[:20]:
        yield {
            "kernel": one.name[:70],
            "calls": one.calls,
            "ms": round(1e3 * one.seconds, 2),
            "share": round(one.seconds / busy, 3),
        }


def hugging_face(line: Line, folder: Path) -> Iterator[Row]:
    """Time the same steps with `EsmForMaskedLM` under autocast to bf16, on padded batches.

    The proteins are sorted by length before they are divided among batches, so that little is padding.
    """
    trainer = HuggingFaceTrainer(line.size, line.precision, device())
    if line.compiled:
        # Building kernels takes a minute on a CPU, for which there is nothing to learn from them.
        trainer.model.compile(backend="inductor" if device().type == "cuda" else "eager")
    lengths = [n for number in range(line.micro_batches) for n in protein_lengths(line, SEED + number)]
    proteins = sorted(random_proteins(lengths, SEED), key=lambda protein: len(protein.input_ids))
    batches = by_padded_tokens(line.tokens)(proteins)
    padded = trainer.on_device(batches)
    times = milliseconds(lambda: trainer.step(padded), line)
    yield {
        **figures_of_steps(line, lengths, times),
        "micro-batches": len(batches),
        "computed/real": round(padded_tokens(batches) / sum(lengths), 2),
        "compiled": line.compiled,
    }
