"""Measures a checkpoint on every protein: a language model by masks, another by the labels of its task."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esm2mega.batch import PackedBatch
from esm2mega.config.best_metric import HEADLINES
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.stream.recipe import masks_settings
from esm2mega.finetune.bootstrap import bootstrap_metrics
from esm2mega.finetune.checkpoint import TaskCheckpoint, loaded
from esm2mega.finetune.evaluate import measure, packs_of, split_by_protein, task_settings
from esm2mega.finetune.metrics import Array, Predictions
from esm2mega.finetune.run import batch_spec
from esm2mega.report.progress import Progress
from esm2mega.train.evaluate import MaskedEvaluation, evaluate
from esm2mega.train.finite import Watched, refuse_large
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.per_protein import PerProtein, ProteinLosses

LOSS = "loss"
"""Names the loss among the measures."""


@dataclass(frozen=True)
class Measurement:
    """Holds what was measured of one checkpoint, on the main process alone.

    Attributes:
        loss: Mean loss of all proteins; None if there is nothing to predict.
        losses: Loss of each protein.
        metrics: Metrics of the task by name; empty for language models.
        predictions: Predictions of the task; None for language models.
    """

    loss: float | None
    losses: ProteinLosses
    metrics: Mapping[str, float | None]
    predictions: Predictions | None = None

    @property
    def adds_up(self) -> bool:
        """Return whether the losses of the proteins give that of all, as those of a user's loss may not."""
        total = self.losses.counts.sum()
        if self.loss is None:
            return not total
        # Loose enough for sums in bf16 and fp32, which were added in another order.
        return bool(total) and bool(
            np.isclose(self.losses.sums.sum() / total, self.loss, rtol=1e-3, atol=0.0, equal_nan=True)
        )


class Model(ABC):
    """Holds a checkpoint that is compared, and what it is measured on; no weights are read yet.

    Attributes:
        name: The checkpoint as the user named it.
    """

    name: str

    @property
    @abstractmethod
    def start(self) -> StartPoint:
        """Return the opened checkpoint."""

    @property
    @abstractmethod
    def recipe(self) -> str:
        """Return the hash that names how it is evaluated."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what `recipe` hashes, by name."""

    @property
    @abstractmethod
    def cure(self) -> str:
        """Say how checkpoints of several recipes come to the same one."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """Return the name of the measure that decides."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the proteins, and of which of their labels are known."""

    @property
    @abstractmethod
    def scale(self) -> Any:
        """Return what the unit of the loss depends on besides the recipe."""

    @abstractmethod
    def id(self, row: int) -> str:
        """Return the id of a protein."""

    @abstractmethod
    def measure(self) -> Measurement | None:
        """Measure all proteins; None on all but the main process. All ranks call this together."""

    @abstractmethod
    def resampled(self, found: Measurement, of: Model) -> dict[str, Array]:
        """Return the metrics in resamples of the proteins, ``[d]`` each.

        Args:
            found: What was measured.
            of: The model whose configuration says how many resamples are drawn, and by which seed.
        """


@dataclass(frozen=True)
class LanguageModel(Model):
    """Is a `Model` that predicts masked residues."""

    name: str
    evaluation: MaskedEvaluation

    headline = LOSS
    cure = "give data.max_seq_length=N or the keys of eval as KEY=VALUE, which hold for all"
    scale = None

    @property
    def start(self) -> StartPoint:
        return self.evaluation.start

    @property
    def recipe(self) -> str:
        return self.evaluation.recipe

    @property
    def settings(self) -> dict[str, Any]:
        return masks_settings(self.evaluation.run.eval, self.evaluation.run.data.max_seq_length)

    @property
    def fingerprint(self) -> str:
        return self.evaluation.store.fingerprint

    def id(self, row: int) -> str:
        return self.evaluation.store.id(row)

    def measure(self) -> Measurement | None:
        loss = PerProtein(MLMLossReduction(), PackedBatch.by_protein)
        watched = Watched(loss)
        with self.evaluation.loaded() as (model, packs, ranks):
            with Progress(len(packs), self.name, "pack", enabled=ranks.is_main) as progress:
                means = evaluate(model, watched, packs, ranks, progress)
            self.evaluation.refuse_not_finite(watched, ranks)
            assert means is not None
            refuse_large(means["loss"], self.name, self.start)
            losses = loss.gather(len(self.evaluation.store), ranks)
        return None if losses is None else Measurement(means["loss"], losses, {})

    def resampled(self, found: Measurement, of: Model) -> dict[str, Array]:
        return {}


@dataclass(frozen=True)
class TaskModel(Model):
    """Is a `Model` that predicts the labels of a task."""

    name: str
    task: TaskCheckpoint
    proteins: LabelledProteins

    cure = "give the keys of task and data that differ as KEY=VALUE, which hold for all"

    @property
    def start(self) -> StartPoint:
        return self.task.start

    @property
    def recipe(self) -> str:
        return self.task.recipe

    @property
    def settings(self) -> dict[str, Any]:
        run = self.task.run
        return task_settings(run.task, run.data, run.seed, self.task.loss)

    @property
    def headline(self) -> str:
        return HEADLINES[self.task.info.kind]

    @property
    def fingerprint(self) -> str:
        proteins = self.proteins
        known = ~proteins.is_missing
        # The order of classes and columns is that of each training, so they are counted.
        counts = known.reshape(len(known), -1).sum(axis=1)
        parts = (proteins.offsets, proteins.tokens, counts)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    @property
    def scale(self) -> Any:
        info = self.task.info
        numbers: list[Sequence[float]] = [info.mean, info.std]
        if self.task.run.task.class_weights == "balanced":
            numbers.append(info.counts)
        return [dict(zip(info.output_names, values, strict=False)) for values in numbers]

    def id(self, row: int) -> str:
        return self.proteins.id(row)

    def measure(self) -> Measurement | None:
        task = self.task
        loss = PerProtein(task.loss, split_by_protein(task.info))
        with loaded(task) as (model, ranks):
            packs = packs_of(self.proteins, batch_spec(task.run), ranks)
            with Progress(len(packs), self.name, "pack", enabled=ranks.is_main) as progress:
                found = measure(model, loss, task.predict, packs, task.info, ranks, progress)
            assert found is not None
            task.refuse_not_finite(found, self.proteins)
            losses = loss.gather(len(self.proteins), ranks)
        return None if losses is None else Measurement(found.loss, losses, found.metrics, found.predictions)

    def resampled(self, found: Measurement, of: Model) -> dict[str, Array]:
        assert found.predictions is not None and isinstance(of, TaskModel)
        run = of.task.run
        return bootstrap_metrics(found.predictions, self.task.info, run.task.bootstrap, run.seed)
