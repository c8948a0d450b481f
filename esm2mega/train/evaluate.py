"""Computes the loss on a validation set, and for comparison the loss of predicting residue frequencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from esm2mega.config.batches import processes_of_a_replica
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import load_run_over
from esm2mega.config.machine import on_this_machine
from esm2mega.config.schema import ParallelConfig, Run
from esm2mega.config.validate import validate
from esm2mega.convert.start_point import StartPoint, asks_to_verify, open_checkpoint
from esm2mega.data.store.cache import open_store
from esm2mega.data.store.limit import limited
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.store.verification import verify
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import EvalPacks
from esm2mega.data.stream.recipe import describe_masks, masks_recipe
from esm2mega.files import OTHER_OUT, check_out, write_json
from esm2mega.lora.base import open_base
from esm2mega.lora.checkpoint import load_model
from esm2mega.model.build import build_model
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.parallel.paths import expand_paths
from esm2mega.report.progress import Progress, show_bytes
from esm2mega.train.finite import Watched, refuse_large, refuse_not_finite
from esm2mega.train.losses import LossReduction, Means, MLMLossReduction, perplexity
from esm2mega.train.step import Batch, run_schedule
from esm2mega.vocabulary import SPECIAL_TOKENS

T = TypeVar("T")

_GROUP = 16
"""Sets how many micro-batches the schedule gets at once: they keep a pipeline full, and fit into memory."""


def unigram_log_probabilities(token_counts: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Return the logarithm of each token's frequency among possible labels of the training set, ``[v]`` fp64.

    One is added to each count, so that no label is impossible. Special tokens, ``<unk>`` among them, are
    never labels and get no probability (``-inf``).
    """
    counts = torch.as_tensor(np.asarray(token_counts), dtype=torch.float64, device=device) + 1.0
    counts[list(SPECIAL_TOKENS)] = 0.0
    return (counts / counts.sum()).log()


@torch.no_grad()
def evaluate(
    model: list[Any],
    loss: LossReduction,
    batches: Iterable[Batch],
    ranks: Ranks,
    progress: Progress | None = None,
    abandon: Callable[[], bool] | None = None,
) -> Means | None:
    """Compute global means over a split; all ranks call this together.

    Args:
        model: This rank's chunks; left in training mode.
        loss: What to measure.
        batches: This rank's packs, equally many on every data-parallel rank.
        ranks: Where this process stands.
        progress: Advanced by one per micro-batch.
        abandon: Called after every group of micro-batches; True, on every rank alike, ends the evaluation.

    Returns:
        The means, each None if it has no labels; None when the evaluation was abandoned.
    """
    abandoned = False
    for chunk in model:
        chunk.eval()
    reports: list[dict[str, Tensor]] = []
    for count, found in run_groups(model, loss, batches, ranks):
        reports += found
        if progress is not None:
            progress.update(count)
        # Every rank has equally many groups, so all of them ask together.
        if abandon is not None and (abandoned := abandon()):
            break
    for chunk in model:
        chunk.train()
    return None if abandoned else loss.means(reports, ranks.device)


@torch.no_grad()
def run_groups(
    model: list[Any],
    loss: LossReduction,
    batches: Iterable[Batch],
    ranks: Ranks,
    dropout_seed: int | None = None,
) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
    """Run packs through the pipeline, a group at a time; all ranks of one model call this together.

    Args:
        model: This rank's chunks.
        loss: Called on the last stage with every pack and its outputs.
        batches: This rank's packs.
        ranks: Where this process stands.
        dropout_seed: Seed of the dropout in the encoder of a model in training mode; None for none.

    Yields:
        How many packs were run, and the reports of `loss` on them.
    """
    # Only the interleaved schedule asks for a number of micro-batches that the pipeline divides.
    multiple = ranks.pp_size if len(model) > 1 else 1
    for group in _groups(iter(batches), _round_up(_GROUP, multiple)):
        filled = _filled(group, multiple)
        reports = run_schedule(
            model, loss, filled, ranks.device, forward_only=True, dropout_seed=dropout_seed
        )
        yield len(group), reports


def gathered(mine: T | None, ranks: Ranks) -> list[T] | None:
    """Gather what an evaluation left on each replica of the model; all ranks call this together.

    One process of a replica gives it: the first of the tensor- and context-parallel groups in the last stage.
    The gather runs over the world.

    Args:
        mine: What this process has; None for nothing.
        ranks: Where this process stands.

    Returns:
        On the main process what the replicas gave, without None; None on the others.
    """
    gives = ranks.is_output_rank and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    parts: list[T | None] = [None] * ranks.world_size
    dist.gather_object(mine if gives else None, parts if ranks.is_main else None, dst=0)
    return [part for part in parts if part is not None] if ranks.is_main else None


def evaluation_record(metrics: Means, recipe: str, split: str = "valid") -> dict[str, Any]:
    """Return the values of an evaluation record in the log, named after the split: ``valid`` or ``test``."""
    return {
        f"{split}_loss": metrics["loss"],
        f"{split}_perplexity": perplexity(metrics["loss"]),
        "unigram_loss": metrics["unigram_loss"],
        "eval_recipe": recipe,
    }


@dataclass(frozen=True)
class MaskedEvaluation:
    """Holds a checkpoint of a language model, and the proteins that it is to be evaluated on.

    Attributes:
        start: The checkpoint; one of adapters comes with its base.
        run: Its configuration, changed by the overrides of this start.
        store: The proteins.
    """

    start: StartPoint
    run: Run
    store: TokenStore

    @property
    def recipe(self) -> str:
        """Return the hash that names how the proteins are masked."""
        return masks_recipe(self.run.eval, self.run.data.max_seq_length)

    @property
    def masks(self) -> str:
        """Return the description of how the proteins are masked."""
        return describe_masks(self.run.eval, self.run.data.max_seq_length)

    def refuse_not_finite(self, watched: Watched, ranks: Ranks) -> None:
        """Raise `UserError` if logits were not finite; all ranks call this together."""
        refuse_not_finite(gathered(watched.row, ranks), self.store.id, "the distribution", self.start)

    @contextmanager
    def loaded(self, max_batches: int = 0) -> Iterator[tuple[list[Any], EvalPacks, Ranks]]:
        """Yield this rank's chunks with their weights and its packs, within process groups.

        Args:
            max_batches: Most packs over all ranks; 0 for all.
        """
        run = self.run
        with process_groups(run.parallel, run.seed) as ranks:
            has_lora = run.lora.rank is not None
            model = build_model(run.model, run.parallel, ranks.device, run.seed, has_lora=has_lora)
            load_model(self.start, run, model)
            spec = BatchSpec(run.data, run.train.micro_batch_tokens, run.seed)
            yield (
                model,
                EvalPacks(self.store, spec, run.eval, max_batches, ranks.dp_rank, ranks.dp_size),
                ranks,
            )


def open_evaluation(
    checkpoint: str | Path | StartPoint, data: str | Path, overrides: Sequence[str] = ()
) -> MaskedEvaluation:
    """Open a checkpoint and the proteins, without reading weights yet; all ranks call this together.

    Args:
        checkpoint: As for `evaluate_checkpoint`.
        data: As for `evaluate_checkpoint`.
        overrides: As for `evaluate_checkpoint`.
    """
    verification = asks_to_verify(overrides)
    start = open_checkpoint(checkpoint, verification)
    run = load_run_over(on_this_machine(start.run), overrides)
    run = adapt_layout(expand_paths(run), overrides)
    validate(run, world_size_from_environment())
    start = open_base(start, run.init_from, verification)
    store = open_store(str(data), run.data, None, "--data", show_bytes)
    on_one_rank(lambda: verify([store]), timedelta(minutes=run.parallel.timeout_minutes))
    return MaskedEvaluation(start, run, limited(store, run.data))


def evaluate_checkpoint(
    checkpoint: str | Path | StartPoint,
    data: str | Path,
    out: str | Path | None = None,
    max_batches: int | None = None,
    micro_batch_tokens: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Compute masked-language-model loss and perplexity of a checkpoint on a token store, at any layout.

    Args:
        checkpoint: As for `esm2mega.checkpoint.choice.choose_checkpoint`, or an opened start.
        data: Token store, or a file of sequences.
        out: JSON file for the result; None for no file.
        max_batches: Stop after so many packs over all ranks; None for the whole store.
        micro_batch_tokens: Pack length; None for that of training.
        overrides: ``key=value`` settings that replace those of the checkpoint, such as the parallel layout.

    Returns:
        The numbers that are written to `out`; the losses are None where nothing is to be predicted.

    Raises:
        UserError: An input is refused, or the model gives values that are not finite.
    """
    if out is not None:
        check_out(Path(out))
    changes = list(overrides)
    if micro_batch_tokens is not None:
        changes.append(f"train.micro_batch_tokens={micro_batch_tokens}")
    evaluation = open_evaluation(checkpoint, data, changes)
    start = evaluation.start
    with evaluation.loaded(max_batches or 0) as (model, batches, ranks):
        # A converted checkpoint does not know what it was trained on, so it has no unigram baseline.
        counts = start.state["token_counts"]
        unigram = None if counts is None else unigram_log_probabilities(np.asarray(counts), ranks.device)
        with Progress(len(batches), "evaluate", "pack", enabled=ranks.is_main) as progress:
            watched = Watched(MLMLossReduction(unigram))
            metrics = evaluate(model, watched, batches, ranks, progress)
        assert metrics is not None and metrics["count"] is not None
        evaluation.refuse_not_finite(watched, ranks)
        refuse_large(metrics["loss"], str(data), start)
        result = {
            "checkpoint": str(start.path),
            "data": str(data),
            "step": start.state["step"],
            "loss": metrics["loss"],
            "perplexity": perplexity(metrics["loss"]),
            "unigram_loss": metrics.get("unigram_loss"),
            "num_labels": int(metrics["count"]),
            "num_sequences": len(evaluation.store),
            "eval_recipe": evaluation.recipe,
            "eval_masks": evaluation.masks,
        }
        if out is not None and ranks.is_main:
            write_json(Path(out), result, OTHER_OUT)
    return result


def adapt_layout(run: Run, overrides: Sequence[str]) -> Run:
    """Change the layout and the batch of a training run, in place, to fit the number of processes here.

    The layout of training stays if it fits or was asked for; else every process holds the whole model. The
    batch becomes one micro-batch per pipeline stage of each replica, and the warmup zero: their rules concern
    training, and checkpoints that no training wrote have default values there.
    """
    world, parallel = world_size_from_environment(), run.parallel
    model_parallel = processes_of_a_replica(parallel)
    if world % model_parallel and not any(x.lstrip("+").startswith("parallel.") for x in overrides):
        run.parallel = ParallelConfig(timeout_minutes=parallel.timeout_minutes)
        model_parallel = 1
    data_parallel = max(1, world // model_parallel)
    run.train.micro_batch_size = run.train.global_batch_size = run.train.accumulate_grad_batches = None
    run.train.global_batch_tokens = (
        run.train.micro_batch_tokens * data_parallel * run.parallel.pipeline_model_parallel_size
    )
    run.schedule.warmup_steps = 0
    return run


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while group := list(islice(batches, size)):
        yield group


def _filled(group: list[Batch], multiple: int) -> list[Batch]:
    """Return the packs, filled up with packs without labels to a multiple."""
    unlabelled = group[0].without_labels()
    return group + [unlabelled] * (-len(group) % multiple)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
