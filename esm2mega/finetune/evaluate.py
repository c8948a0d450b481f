"""Gathers the predictions of all ranks for a split of labelled proteins, and computes its loss and metrics.

Legend: ``n`` proteins and ``R`` residues of a micro-batch, ``k`` targets or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from esm2mega.batch import LabelledBatch
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.data.labels.stream import LabelledPacks
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.recipe import recipe_hash
from esm2mega.finetune.baseline import baseline_metrics
from esm2mega.finetune.metrics import Predictions, metrics_of, objects, unseen_labels
from esm2mega.finetune.user_code import Predict
from esm2mega.pairs import num_pairs
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.progress import Progress
from esm2mega.train.evaluate import evaluate, gathered
from esm2mega.train.losses import LossReduction, LossTerms, Means
from esm2mega.train.per_protein import Split

UNSEEN = "unseen_classes"
"""Names, in records, the number of labels of each class that no training has had a label of."""

_RECIPE_VERSION = 1
_OF_THE_LOSS = ("kind", "loss", "huber_delta", "scale_targets", "class_weights", "label_smoothing")


class Collecting(LossReduction):
    """Wraps a loss and keeps the predictions of what it sees; without labels, its sum and count are 0.

    Attributes:
        seen: The predictions, an entry for each micro-batch.
        not_finite: Row of the first protein with an output or prediction that is not finite; None if all are.
    """

    def __init__(self, loss: LossReduction, predict: Predict, info: TargetInfo) -> None:
        """Make the wrapper.

        Args:
            loss: The loss.
            predict: Turns outputs into predictions.
            info: Meaning of the predictions.
        """
        self.loss, self.predict, self.info = loss, predict, info
        self.seen: list[dict[str, Any]] = []
        self.not_finite: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.loss.names

    def means(self, reports: Sequence[dict[str, Tensor]], device: torch.device) -> Means:
        return self.loss.means(reports, device)

    def forward(self, batch: LabelledBatch, output: Tensor) -> LossTerms:
        predictions = self.predict(output)
        self.seen.append(_kept(batch, predictions, self.info))
        if self.not_finite is None:
            self.not_finite = _not_finite(batch, (output, predictions), self.info)
        if batch.labels is not None:
            return self.loss.terms(batch, output)
        nothing = (output.new_zeros(()), torch.zeros((), dtype=torch.int64, device=output.device))
        return LossTerms(*nothing, {name: nothing for name in self.names if name != "loss"})


def _kept(batch: LabelledBatch, values: Tensor, info: TargetInfo) -> dict[str, Any]:
    segments, per_residue = batch.head_inputs, info.per_residue
    if info.per_pair:
        return _kept_pairs(batch, values)
    rows = batch.rows[segments.owners] if per_residue else batch.rows
    kept = {"rows": rows, "values": values, "labels": batch.labels}
    kept["numbers"] = segments.numbers if per_residue else None
    return {name: None if value is None else value.cpu().numpy() for name, value in kept.items()}


def _not_finite(batch: LabelledBatch, found: Sequence[Tensor], info: TargetInfo) -> int | None:
    """Return the row of the first protein with a value that is not finite; None if all values are."""
    for values in found:
        if not bool(values.isfinite().all()):
            kept = _kept(batch, values.double(), info)
            pairs = zip(kept["rows"].tolist(), kept["values"], strict=True)
            row = next((row for row, value in pairs if not np.isfinite(value).all()), None)
            if row is not None:
                return row
    return None


def _kept_pairs(batch: LabelledBatch, values: Tensor) -> dict[str, Any]:
    """Keep an entry for each protein, with all of its pairs."""
    segments, lengths = batch.head_inputs, batch.head_inputs.residue_counts
    borders = np.cumsum([num_pairs(length) for length in lengths])[:-1]

    def split(pairs: Tensor) -> Any:
        return objects(np.split(pairs.cpu().numpy(), borders) if lengths else [])

    first = np.cumsum([0, *lengths])[:-1]
    return {
        "rows": batch.rows.cpu().numpy(),
        "numbers": segments.numbers.cpu().numpy()[first],
        "values": split(values[:, 0]),
        "labels": None if batch.labels is None else split(batch.labels),
    }


@dataclass(frozen=True)
class Measured:
    """Holds the loss, the metrics and the predictions of a split.

    Attributes:
        loss: Mean over labels, None if there are none; the same on every rank.
        num_labels: Number of labels.
        predictions: Predictions on the main process; None on the others.
        metrics: Metrics by name, the same on every rank; empty without labels.
        unseen: Number of labels of each class that no training has had a label of, the same on every rank;
            empty where there are none.
        not_finite: On the main process, rows of proteins with outputs or predictions that are not finite, at
            most one of each rank; None on the others.
    """

    loss: float | None
    num_labels: int
    predictions: Predictions | None
    metrics: dict[str, float | None]
    unseen: dict[str, int]
    not_finite: list[int] | None


def measure(
    model: list[Any],
    loss: LossReduction,
    predict: Predict,
    packs: LabelledPacks,
    info: TargetInfo,
    ranks: Ranks,
    progress: Progress | None = None,
    abandon: Callable[[], bool] | None = None,
    baseline: bool = False,
) -> Measured | None:
    """Predict a split, and compare with its labels where it has some; all ranks call this together.

    Args:
        model: This rank's chunks; left in training mode.
        loss: The loss.
        predict: Turns outputs into predictions.
        packs: This rank's packs.
        info: Meaning of the predictions.
        ranks: Ranks of this process.
        progress: As for `evaluate`.
        abandon: As for `evaluate`.
        baseline: Also compute the metrics of a predictor that knows only the training labels.

    Returns:
        The predictions, loss and metrics; None if the evaluation was abandoned.
    """
    collecting = Collecting(loss, predict, info)
    means = evaluate(model, collecting, packs, ranks, progress, abandon)
    if means is None:
        return None
    predictions, not_finite = _gathered(collecting.seen, ranks), gathered(collecting.not_finite, ranks)
    metrics: dict[str, float | None] = {}
    unseen: dict[str, int] = {}
    if predictions is not None and predictions.labels is not None:
        metrics = _undefined(predictions, info) if not_finite else {**metrics_of(predictions, info)}
        unseen = unseen_labels(predictions, info)
        if baseline and not not_finite:
            metrics |= baseline_metrics(predictions, info)
        # What a user's own loss logs besides; the names of metrics have precedence.
        metrics = {name: means[name] for name in loss.names if name != "loss"} | metrics
    # The main process tells all others.
    shared: list[Any] = [metrics, unseen]
    dist.broadcast_object_list(shared, src=0, device=ranks.device)
    assert means["count"] is not None
    return Measured(means["loss"], int(means["count"]), predictions, shared[0], shared[1], not_finite)


def _undefined(found: Predictions, info: TargetInfo) -> dict[str, float | None]:
    """Return None for every metric, of predictions that are not finite."""
    values = found.values
    zeros = np.zeros_like(values)
    if values.dtype == object:  # of pairs
        zeros = objects([np.zeros_like(value) for value in values])
    return dict.fromkeys(metrics_of(replace(found, values=zeros), info))


def _gathered(seen: Sequence[dict[str, Any]], ranks: Ranks) -> Predictions | None:
    """Gather the predictions of all ranks on the main process, in the order of the table."""
    parts = gathered(_joined(seen) if seen else None, ranks)
    if parts is None:
        return None
    whole = _joined(parts)
    keys = [whole["rows"]] if whole["numbers"] is None else [whole["numbers"], whole["rows"]]
    order = np.lexsort(keys)
    ordered: dict[str, Any] = {name: None if value is None else value[order] for name, value in whole.items()}
    return Predictions(**ordered)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: None if parts[0][name] is None else np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }


def split_by_protein(info: TargetInfo) -> Split:
    """Return what splits a batch with labels and the output of the head by proteins, for `PerProtein`."""

    def split(batch: LabelledBatch, output: Tensor) -> Iterator[tuple[int, LabelledBatch, Tensor]]:
        sizes = batch.head_inputs.residue_counts
        if info.per_pair:
            sizes = [num_pairs(length) for length in sizes]
        elif not info.per_residue:
            sizes = [1] * batch.num_sequences
        return batch.by_protein(output, sizes)

    return split


def packs_to_a_label(packs: LabelledPacks) -> int | None:
    """Return how many packs there are up to the first with a known label; None if none has one."""
    for number, batch in enumerate(packs, start=1):
        labels = batch.labels
        if (
            labels is not None
            and (~labels.isnan() if labels.is_floating_point() else labels != IGNORED).any()
        ):
            return number
    return None


def task_recipe(task: TaskConfig, data: DataConfig, seed: int, loss: LossReduction) -> str:
    """Return the hash of all that decides the loss of given predictions; see `esm2mega.data.stream.recipe`.

    Args:
        task: The task, with the settings of its loss.
        data: The treatment of long proteins.
        seed: Seed of the run, which decides random crops.
        loss: The loss; one that a program gives is known by the name of its class alone.
    """
    return recipe_hash("labels", _RECIPE_VERSION, task_settings(task, data, seed, loss))


def task_settings(task: TaskConfig, data: DataConfig, seed: int, loss: LossReduction) -> dict[str, Any]:
    """Return what `task_recipe` hashes, by name."""
    return {
        "class": type(loss).__qualname__,
        **{key: getattr(task, key) for key in _OF_THE_LOSS},
        "max_seq_length": data.max_seq_length,
        "too_long": data.too_long,
        "crop": data.crop if data.too_long == "crop" else None,
        "seed": seed if data.too_long == "crop" and data.crop == "random" else None,
    }


def packs_of(proteins: LabelledProteins, spec: BatchSpec, ranks: Ranks, limit: int = 0) -> LabelledPacks:
    """Return this rank's share of a split, or of `limit` packs of it over all ranks (0 for all packs)."""
    return LabelledPacks(proteins, spec, limit, ranks.dp_rank, ranks.dp_size)
