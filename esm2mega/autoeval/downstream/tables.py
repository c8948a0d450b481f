"""Opens the tables that a pretraining is measured on, takes a bounded part of them, and counts its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from esm2mega.autoeval.probe.labels import SPLITS, TRAIN, fewer_labels, read_splits
from esm2mega.config.load import load_run, load_run_over
from esm2mega.config.schema import DownstreamConfig, ModelConfig, Run
from esm2mega.config.task import PAIR_KIND, validate_task
from esm2mega.data.benchmarks.tables import MASK, read_manifest
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError

TASK_FILE = "task.yaml"
"""Says in a folder of one's own tables what is predicted: a configuration with the section `task`."""

_VECTOR_BYTES = 4
_FIT_BYTES = 16
"""Counts the bytes that a fit takes for each number of a task's vectors: copies, scaled and in fp64."""


@dataclass(frozen=True)
class Task:
    """Holds a task: its name, the meaning of its labels, and the proteins of each split.

    Proteins are named ``SPLIT/ROW``, so that their ids are unique whatever the tables hold.
    """

    name: str
    info: TargetInfo
    splits: Mapping[str, LabelledProteins]

    @property
    def num_vectors(self) -> int:
        """Return how many vectors there are: one for each protein, or for each residue."""
        return sum(self.num_rows(split) for split in self.splits)

    def num_rows(self, split: str) -> int:
        """Return how many vectors a split has."""
        proteins = self.splits[split]
        return int(proteins.offsets[-1]) if self.info.per_residue else len(proteins)


def open_tasks(settings: DownstreamConfig, seed: int) -> list[Task]:
    """Read the tables of all tasks; all ranks call this together.

    Args:
        settings: Folders of the tasks, and the most proteins of each split.
        seed: Seed by which the proteins are chosen.

    Raises:
        UserError: A folder does not say what is predicted, or a table is bad.
    """
    return [_open(Path(folder), settings, seed) for folder in settings.tasks]


def check_memory(tasks: Sequence[Task], hidden_size: int, limit_gb: float) -> None:
    """Refuse tasks whose vectors, and the fit of the largest one, take more memory than they may.

    Args:
        tasks: The tasks.
        hidden_size: Width of a vector.
        limit_gb: Most memory of the first process, in GB.

    Raises:
        UserError: They take more.
    """
    counts = {task.name: task.num_vectors for task in tasks}
    largest = max(counts, key=lambda name: counts[name])
    needed = hidden_size * (_VECTOR_BYTES * sum(counts.values()) + _FIT_BYTES * counts[largest])
    if needed > limit_gb * 1e9:
        raise UserError(
            f"downstream.memory_gb={limit_gb:g}: the vectors of downstream.tasks, and the head of {largest} "
            f"with its {counts[largest]:,} vectors, take {needed / 1e9:.3g} GB on one process; lower "
            "downstream.max_train and downstream.max_test, or raise downstream.memory_gb"
        )


def _open(folder: Path, settings: DownstreamConfig, seed: int) -> Task:
    run = _run_of(folder)
    validate_task(run)
    if run.task.kind == PAIR_KIND:
        raise UserError(
            f"downstream.tasks={folder}: task.kind=contact has labels of pairs of residues, which no small "
            "head learns; remove it"
        )
    found, info = read_splits(folder, run.task, run.data, None)
    splits = {}
    for number, split in enumerate(SPLITS):
        if split in found:
            most = settings.max_train if split == TRAIN else settings.max_test
            splits[split] = _part(found[split], split, most, (seed, number))
    if info.per_residue:
        splits[TRAIN] = fewer_labels(splits[TRAIN], settings.max_residues, seed)
    return Task(folder.name, info, splits)


def _part(proteins: LabelledProteins, split: str, most: int, seed: Sequence[int]) -> LabelledProteins:
    """Return at most so many proteins, chosen by the seed and in their order."""
    rows = np.arange(len(proteins))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(list(seed)).choice(len(rows), most, replace=False))
    part = proteins.select(rows)
    if np.any(part.is_missing.all(axis=0)):
        raise UserError(
            f"{proteins.path}: a column has no label in the {len(part):,} proteins that are taken for "
            f"{split}; raise downstream.max_train and downstream.max_test, or complete the table"
        )
    return replace(part, ids=[f"{split}/{row}" for row in range(len(part))])


def _run_of(folder: Path) -> Run:
    """Return a configuration whose section `task` says what a folder's tables hold."""
    if (folder / TASK_FILE).is_file():
        return load_run(str(folder / TASK_FILE), ["model.size=tiny"])
    manifest = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    if manifest is None or "kind" not in manifest:
        raise UserError(
            f"downstream.tasks={folder}: does not say what is predicted; give a folder that `esm2mega "
            f"prepare flip` or `esm2mega prepare tape` made, or write {TASK_FILE} into it, with the section "
            "task of a fine-tuning"
        )
    words = [f"task.kind={manifest['kind']}"]
    table = next((folder / f"{split}.csv" for split in SPLITS if (folder / f"{split}.csv").is_file()), None)
    if table is not None and MASK in table.open().readline().strip().split(","):
        words.append(f"task.mask_column={MASK}")
    return load_run_over(Run(model=ModelConfig(size="tiny")), words)
