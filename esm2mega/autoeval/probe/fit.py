"""Fits a head to one layer of embeddings, and predicts the held-out splits with it.

Legend: ``n`` proteins, ``L`` residues of a protein, ``R`` residues of a split that have labels, ``h`` hidden
size, ``m`` targets, ``k`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil

from esm2mega.autoeval.probe.heads import CNN, Head
from esm2mega.autoeval.probe.labels import TRAIN, VALID
from esm2mega.autoeval.probe.targets import fit_targets, label_columns, predict_targets
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.metrics import Metrics, Predictions, metrics_of

Array = npt.NDArray[Any]


class Vectors(Protocol):
    """Gives the vectors of a layer by the ids of proteins, fp32."""

    def vectors(self, layer: str, ids: Sequence[str]) -> Array:
        """Return a vector for each protein, ``[n, h]``."""

    def residues(self, layer: str, name: str) -> Array:
        """Return the vectors of a protein's residues, ``[L, h]``."""


@dataclass(frozen=True)
class Task:
    """Holds what all layers have in common.

    Attributes:
        head: Name of the head.
        seed: Seed of what is drawn.
        info: Meaning of the labels.
        splits: Proteins with labels, for training, validation and perhaps test.
        embeddings: The vectors.
    """

    head: str
    seed: int
    info: TargetInfo
    splits: Mapping[str, LabelledProteins]
    embeddings: Vectors


@dataclass(frozen=True)
class Fitted:
    """Holds what a layer gave: predictions and metrics of the held-out splits, and what was chosen."""

    predictions: Mapping[str, Predictions]
    metrics: Mapping[str, Metrics]
    chosen: Sequence[Mapping[str, float]]


def fit_layer(task: Task, layer: str) -> Fitted:
    """Fit the head to the vectors of a layer."""
    predictions, chosen = (_fit_residues if task.info.per_residue else _fit_proteins)(task, layer)
    metrics = {split: metrics_of(each, task.info) for split, each in predictions.items()}
    return Fitted(predictions, metrics, chosen)


def _fit_proteins(task: Task, layer: str) -> tuple[dict[str, Predictions], list[dict[str, float]]]:
    vectors = {name: task.embeddings.vectors(layer, split.ids) for name, split in task.splits.items()}
    labels = {name: label_columns(split.labels) for name, split in task.splits.items()}
    heads, chosen = _fit(task, {name: (vectors[name], labels[name]) for name in (TRAIN, VALID)})
    predictions = {}
    for name, split in task.splits.items():
        if name != TRAIN:
            values = predict_targets(task.info, heads, vectors[name])
            predictions[name] = Predictions(np.arange(len(split)), None, values, split.labels)
    return predictions, chosen


def _fit_residues(task: Task, layer: str) -> tuple[dict[str, Predictions], list[dict[str, float]]]:
    if task.head == CNN:
        predict, chosen = _fit_convolution(task, layer)
    else:
        data = {name: _residue_matrix(task, layer, name) for name in (TRAIN, VALID)}
        heads, chosen = _fit(task, data)

        def predict(vectors: Array) -> Array:
            return predict_targets(task.info, heads, vectors)

    predictions = {}
    for name, split in task.splits.items():
        if name == TRAIN:
            continue
        values = [predict(task.embeddings.residues(layer, protein)) for protein in split.ids]
        lengths = split.lengths
        predictions[name] = Predictions(
            np.repeat(np.arange(len(split)), lengths),
            np.concatenate([np.arange(length) for length in lengths]),
            np.concatenate(values),
            split.labels,
        )
    return predictions, chosen


def _fit_convolution(task: Task, layer: str) -> tuple[Callable[[Array], Array], list[dict[str, float]]]:
    from esm2mega.autoeval.probe.convolution import Convolution, ResidueExamples

    def examples(name: str) -> ResidueExamples:
        split = task.splits[name]
        assert split.labels is not None
        labels = np.split(split.labels, split.offsets[1:-1])
        return ResidueExamples(lambda row: task.embeddings.residues(layer, split.ids[row]), labels)

    train = examples(TRAIN)
    head = Convolution(train.vectors(0).shape[1], task.info, task.seed)
    return head.predict, [head.fit(train, examples(VALID))]


def _residue_matrix(task: Task, layer: str, name: str) -> tuple[Array, Array]:
    """Return vectors and labels of all residues of a split that have any label, ``[R, h]`` and ``[R, m]``."""
    split = task.splits[name]
    assert split.labels is not None
    there = np.asarray(~split.is_missing.all(axis=1))
    width = task.embeddings.residues(layer, split.ids[0]).shape[1]
    # Fitting takes a copy in fp64 besides the one in fp32.
    needed, free = int(there.sum()) * width * 12, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{split.path}: the vectors of its {int(there.sum())} labelled residues take {needed / 1e9:.1f} "
            f"GB, of which {free / 1e9:.1f} are free; give fewer proteins, or --head cnn, which reads one "
            "protein at a time"
        )
    vectors = np.empty((int(there.sum()), width), np.float32)
    place = 0
    for row, protein in enumerate(split.ids):
        kept = there[split.offsets[row] : split.offsets[row + 1]]
        found = task.embeddings.residues(layer, protein)[kept]
        vectors[place : place + len(found)] = found
        place += len(found)
    return vectors, split.labels[there]


def _fit(task: Task, data: Mapping[str, tuple[Array, Array]]) -> tuple[list[Head], list[dict[str, float]]]:
    paths = {name: task.splits[name].path for name in data}
    return fit_targets(task.head, task.info, task.seed, data, paths)
