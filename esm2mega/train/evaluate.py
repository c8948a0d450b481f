"""Validation: the loss of a split beside the loss of knowing residue frequencies alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.store import load_weights
from esm2mega.config.load import load_run_over
from esm2mega.config.schema import ParallelConfig, Run
from esm2mega.config.validate import validate, world_size_from_environment
from esm2mega.data.batch import BatchSpec
from esm2mega.data.loader import EvalPacks, PackedBatch
from esm2mega.data.store import TokenStore
from esm2mega.errors import MachineError
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.report.progress import Progress
from esm2mega.train.losses import LossReduction, MLMLossReduction
from esm2mega.train.step import run_schedule

_GROUP = 16
"""Micro-batches handed to the schedule at once: a pipeline stays full, and a large split is never in memory
whole.
"""


def unigram_log_probabilities(token_counts: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Log-frequency of each token in the training set, ``[v]`` fp64, with one count added so that none is
    impossible.
    """
    counts = torch.as_tensor(np.asarray(token_counts), dtype=torch.float64, device=device) + 1.0
    return (counts / counts.sum()).log()


@torch.no_grad()
def evaluate(
    model: list[Any],
    loss: LossReduction,
    batches: Iterable[PackedBatch],
    ranks: Ranks,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Global means over a split; all ranks call this together.

    Args:
        model: This rank's chunks; left in training mode.
        loss: What to measure.
        batches: This rank's packs, equally many on every data-parallel rank.
        ranks: Where this process stands.
        progress: Advanced by one per micro-batch.
    """
    for chunk in model:
        chunk.eval()
    reports: list[dict[str, Tensor]] = []
    for group in _groups(iter(batches), _round_up(_GROUP, ranks.pp_size), ranks.pp_size):
        reports += run_schedule(model, loss, group, ranks.device, forward_only=True)
        if progress is not None:
            progress.update(len(group))
    for chunk in model:
        chunk.train()
    return loss.reduce(reports, ranks.device)


def evaluation_record(metrics: dict[str, float]) -> dict[str, float]:
    """The values of an evaluation record in the log."""
    return {
        "valid_loss": metrics["loss"],
        "valid_perplexity": perplexity(metrics["loss"]),
        "unigram_loss": metrics["unigram_loss"],
    }


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate_checkpoint(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    max_batches: int | None = None,
    micro_batch_tokens: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Masked-language-model loss and perplexity of a checkpoint on a token store, at any layout.

    Args:
        checkpoint: A ``step_XXXXXXXX`` directory, or a run directory for its newest one.
        data: Token store.
        out: JSON file for the result.
        max_batches: Stop after so many packs over all ranks; None for the whole store.
        micro_batch_tokens: Pack length; None for that of training.
        overrides: ``key=value`` over the checkpoint's configuration, such as the parallel layout of this
            evaluation.

    Returns:
        What is written to `out`.
    """
    directory = layout.resolve_checkpoint(checkpoint)
    state = layout.read_state(directory)
    changes = list(overrides)
    if micro_batch_tokens is not None:
        changes.append(f"train.micro_batch_tokens={micro_batch_tokens}")
    run = _for_evaluation(load_run_over(layout.read_config(directory), changes), changes)
    validate(run, world_size_from_environment())
    store = TokenStore(data)
    with process_groups(run.parallel, run.seed) as ranks:
        model = build_model(run.model, run.parallel, ranks.device, run.seed)
        load_weights(directory, model)
        unigram = unigram_log_probabilities(np.asarray(state["token_counts"]), ranks.device)
        spec = BatchSpec(run.data, run.train.micro_batch_tokens, run.seed)
        batches = EvalPacks(store, spec, max_batches or 0, ranks.dp_rank, ranks.dp_size)
        with Progress(len(batches), "evaluate", "pack", enabled=ranks.speaks) as progress:
            metrics = evaluate(model, MLMLossReduction(unigram), batches, ranks, progress)
        result = {
            "checkpoint": str(directory),
            "data": str(data),
            "step": state["step"],
            "loss": metrics["loss"],
            "perplexity": perplexity(metrics["loss"]),
            "unigram_loss": metrics["unigram_loss"],
            "num_labels": int(metrics["count"]),
            "num_sequences": len(store),
        }
        if out is not None and ranks.speaks:
            _write_json(Path(out), result)
    return result


def _for_evaluation(run: Run, overrides: Sequence[str]) -> Run:
    """The training run made fit for the processes that are there.

    The layout of training stays where it fits or was asked for; else every process holds the whole model. The
    batch becomes one micro-batch per rank: the rules on batch sizes speak of training.
    """
    world, parallel = world_size_from_environment(), run.parallel
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world % model_parallel and not any("parallel." in override for override in overrides):
        run.parallel = ParallelConfig(timeout_minutes=parallel.timeout_minutes)
        model_parallel = 1
    data_parallel = max(1, world // model_parallel)
    run.train.global_batch_tokens = (
        run.train.micro_batch_tokens * data_parallel * run.parallel.pipeline_model_parallel_size
    )
    return run


def _groups(batches: Iterator[PackedBatch], size: int, multiple: int) -> Iterator[list[PackedBatch]]:
    """Lists of at most `size` packs, each filled to a multiple with packs without labels (the interleaved
    schedule asks).
    """
    while group := list(islice(batches, size)):
        first = group[0]
        unlabelled = replace(first, label_positions=first.label_positions[:0], labels=first.labels[:0])
        yield group + [unlabelled] * (-len(group) % multiple)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _write_json(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}; choose another --out") from error
