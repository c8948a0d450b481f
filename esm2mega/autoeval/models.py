"""Opens the checkpoints that are compared, and measures each of them on all proteins."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esm2mega.batch import PackedBatch
from esm2mega.convert.start_point import StartPoint, open_checkpoint
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.stream.recipe import masks_settings
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.finetune.checkpoint import TaskCheckpoint, labelled, loaded, open_task
from esm2mega.finetune.evaluate import measure, packs_of, split_by_protein, task_settings
from esm2mega.finetune.metrics import HEADLINES, Array, Predictions, bootstrap_metrics
from esm2mega.finetune.run import batch_spec
from esm2mega.finetune.user_code import GivenCode
from esm2mega.report.progress import Progress
from esm2mega.train.evaluate import MaskedEvaluation, evaluate, open_evaluation
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
        with self.evaluation.loaded() as (model, packs, ranks):
            with Progress(len(packs), self.name, "pack", enabled=ranks.is_main) as progress:
                means = evaluate(model, loss, packs, ranks, progress)
            losses = loss.gather(len(self.evaluation.store), ranks)
        assert means is not None
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
            packs = packs_of(self.proteins, batch_spec(task.run.data, task.run.train, task.run.seed), ranks)
            with Progress(len(packs), self.name, "pack", enabled=ranks.is_main) as progress:
                found = measure(model, loss, task.predict, packs, task.info, ranks, progress)
            losses = loss.gather(len(self.proteins), ranks)
        assert found is not None
        return None if losses is None else Measurement(found.loss, losses, found.metrics, found.predictions)

    def resampled(self, found: Measurement, of: Model) -> dict[str, Array]:
        assert found.predictions is not None and isinstance(of, TaskModel)
        run = of.task.run
        return bootstrap_metrics(found.predictions, self.task.info, run.task.bootstrap, run.seed)


def open_models(
    sides: Sequence[Sequence[str]], data: str, overrides: Sequence[str], code: GivenCode
) -> list[list[Model]]:
    """Open all checkpoints of all sides, and check that they can be compared; all ranks call this together.

    Args:
        sides: Names of the checkpoints of each side, as for `esm2mega evaluate`.
        data: What `esm2mega evaluate` measures such a checkpoint on.
        overrides: ``key=value`` over the configuration of each of them.
        code: The user's own head and loss; each checkpoint gets what it was trained with.
    """
    models = [[_open(name, data, overrides, code) for name in names] for names in sides]
    every = [model for side in models for model in side]
    _check_code(every, code)
    for side in models:
        paths = [model.start.path for model in side]
        if repeated := next((path for path in paths if paths.count(path) > 1), None):
            raise UserError(
                f"{repeated}: is named twice on one side; name each run once, for their spread is the noise"
            )
    for model in every[1:]:
        _check_alike(every[0], model)
    return models


def _check_alike(first: Model, other: Model) -> None:
    """Refuse checkpoints that compute different things, or are measured otherwise or on other proteins."""
    names = f"{first.name} and {other.name}"
    if isinstance(first, TaskModel) and isinstance(other, TaskModel):
        mine, others = (
            (model.task.info.kind, sorted(model.task.info.output_names)) for model in (first, other)
        )
        if mine != others:
            raise UserError(
                f"{names} predict different things ({mine[0]} of {first_of(mine[1])}; {others[0]} of "
                f"{first_of(others[1])}); compare models of one task, or name the columns of --data by "
                "task.target_columns=[NAME], which holds for all"
            )
    elif type(first) is not type(other):
        task, language = (first, other) if isinstance(first, TaskModel) else (other, first)
        raise UserError(
            f"{task.name} has the head of a task, {language.name} is a language model; compare like with like"
        )
    if first.recipe != other.recipe:
        pairs = [(key, value, other.settings[key]) for key, value in first.settings.items()]
        differ = ", ".join(f"{key} {value} and {others}" for key, value, others in pairs if value != others)
        raise UserError(
            f"{names} are evaluated by different recipes (eval_recipe {first.recipe} and {other.recipe}: "
            f"{differ}); {first.cure}"
        )
    if first.fingerprint != other.fingerprint:
        raise UserError(
            f"{names} read different proteins or labels from --data; name its columns by "
            "data.sequence_column=NAME or task.mask_column=NAME, which hold for all"
        )


def _open(name: str, data: str, overrides: Sequence[str], code: GivenCode) -> Model:
    start = open_checkpoint(name)
    if start.task is None:
        return LanguageModel(name, open_evaluation(start, data, overrides))
    recorded = start.task.code
    if recorded is not None:
        code = GivenCode(
            None if recorded.head is None else code.make_head, None if recorded.loss is None else code.loss
        )
    task = open_task(start, overrides, code, needs_loss=True)
    if not task.run.task.bootstrap:
        raise UserError(f"{name}: task.bootstrap=0 leaves no interval of metrics; give task.bootstrap=1000")
    return TaskModel(name, task, labelled(task, data))


def _check_code(models: Sequence[Model], code: GivenCode) -> None:
    """Refuse code that none of the checkpoints was trained with."""
    used = [model.task.code for model in models if isinstance(model, TaskModel)]
    for what, given, taken in (
        ("head", code.make_head, [found.make_head for found in used]),
        ("loss", code.loss, [found.loss for found in used]),
    ):
        if given is not None and given not in taken:
            raise UserError(f"--code: no checkpoint has a {what} of your own code; leave it out")
