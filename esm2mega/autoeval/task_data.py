"""Prepares the tables of a task once, and cuts them down to some proteins where that was asked for."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from esm2mega.autoeval.probe.labels import SPLITS, TEST, read_splits, read_test_split
from esm2mega.autoeval.tasks import CONTACTS, EvalTask
from esm2mega.autoeval.together import alone
from esm2mega.config.load import load_run_over
from esm2mega.config.schema import ModelConfig, Run
from esm2mega.data.benchmarks.flip import find_file, sequence_files
from esm2mega.data.benchmarks.names import FLIP_TASKS, TAPE_TASKS
from esm2mega.data.benchmarks.tables import MASK
from esm2mega.data.benchmarks.tape import find_split
from esm2mega.data.counter_rng import Purpose, stream_starts
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import appearing
from esm2mega.report.results.predictions import read_rows

RunCommand = Callable[[Sequence[str]], None]
"""Runs one command of the package in this process, and raises what it raises."""

_TABLES = "tables"
_WHOLE = "whole"
_NOT_LABELS = ("id", "sequence", MASK)


@dataclass(frozen=True)
class TaskData:
    """Holds the tables of a task.

    Attributes:
        task: The task.
        folder: Folder of ``test.csv``, and of ``train.csv`` and ``valid.csv`` where the task has training.
        columns: Columns of the labels.
        is_masked: Whether a column says which residues count.
        limited: Most proteins of each split; None for all.
        commands: The commands that made the tables.
    """

    task: EvalTask
    folder: Path
    columns: list[str]
    is_masked: bool
    limited: dict[str, int] | None
    commands: list[list[str]]

    @property
    def settings(self) -> list[str]:
        """Return the overrides that describe the task."""
        words = [f"task.kind={self.task.kind}", f"task.target_columns=[{', '.join(self.columns)}]"]
        return [*words, f"task.mask_column={MASK}"] if self.is_masked else words

    @cached_property
    def _read(self) -> tuple[dict[str, LabelledProteins], TargetInfo]:
        run = load_run_over(Run(model=ModelConfig(size="tiny")), self.settings)
        if self.task.has_training:
            return read_splits(self.folder, run.task, run.data, None)
        test, info = read_test_split(self.table(TEST), run.task, run.data)
        return {TEST: test}, info

    @property
    def splits(self) -> dict[str, LabelledProteins]:
        """Return the labelled proteins of each split."""
        return self._read[0]

    @property
    def info(self) -> TargetInfo:
        """Return the meaning of the labels."""
        return self._read[1]

    @cached_property
    def rows(self) -> dict[str, list[dict[str, str]]]:
        """Return the cells of each table by split, in its order."""
        return {split: read_rows(self.table(split)) for split in SPLITS if self.table(split).is_file()}

    def shown_labels(self, split: str) -> list[dict[str, str]]:
        """Return the rows of a table, whose residues that do not count have ``-`` in place of a label."""
        if not self.is_masked:
            return self.rows[split]
        return [
            {**row, **{name: _hidden(row[name], row[MASK]) for name in self.columns}}
            for row in self.rows[split]
        ]

    @property
    def longest(self) -> int:
        """Return the number of residues of the longest protein."""
        return max(len(row["sequence"]) for rows in self.rows.values() for row in rows)

    def table(self, split: str) -> Path:
        """Return the path of the table of a split."""
        return self.folder / f"{split}.csv"

    def release(self) -> None:
        """Forget the proteins, which may be many; they are read again where they are needed."""
        vars(self).pop("_read", None)
        vars(self).pop("rows", None)


def prepare_task(
    task: EvalTask,
    source: Path,
    out: Path,
    limits: Mapping[str, int],
    seed: int,
    run_command: RunCommand,
    say: Callable[[str], None],
) -> TaskData:
    """Make the tables of a task below `out`, if they are not there; all ranks call this together.

    Args:
        task: The task.
        source: Folder of the published files, see `find_source`.
        out: Folder of the tables of all tasks.
        limits: Most proteins of each split.
        seed: Seed of the proteins that are kept.
        run_command: Runs `esm2mega prepare`.
        say: Prints a line.

    Raises:
        UserError: The published files are missing or not as they should be, or a split has no proteins.
    """
    whole = out / task.slug / _WHOLE
    words = _prepare_words(task, find_source(task, source), whole)
    folder = out / task.slug / _TABLES

    def make() -> None:
        if not whole.is_dir():
            say(" ".join(["esm2mega", *words]))
            run_command(words)
        if not folder.is_dir():
            with appearing(folder) as partial:
                for split in SPLITS if task.has_training else (TEST,):
                    rows = _chosen(read_rows(_table_of(task, whole, split)), limits.get(split), seed)
                    _write(partial / f"{split}.csv", rows, task.first_residues)

    # Tables may take a long time to make; the other ranks have nothing else to do.
    alone(make)
    with (folder / f"{TEST}.csv").open(newline="") as file:
        header = next(csv.reader(file))
    columns = [name for name in header if name not in _NOT_LABELS]
    limited = {split: limits[split] for split in SPLITS if split in limits} or None
    return TaskData(task, folder, columns, MASK in header, limited, [words])


def _hidden(labels: str, mask: str) -> str:
    return "".join(label if kept == "1" else "-" for label, kept in zip(labels, mask, strict=True))


def find_source(task: EvalTask, source: Path) -> Path:
    """Return the folder or file of the published files of a task.

    Raises:
        UserError: There is none.
    """
    folder = TAPE_TASKS[task.task].folder if task.family == "tape" else task.task
    places = (source / task.family / folder, source / folder)
    if task.family == "deeploc2":
        tables = [path for place in (source / task.family, source) for path in sorted(place.glob("*.csv"))]
        if len(tables) != 1:
            raise UserError(
                f"--source {source}: has {len(tables) or 'no'} CSV files in {source / task.family}; put "
                "Swissprot_Train_Validation_dataset.csv there, alone"
            )
        return tables[0]
    if (found := next((place for place in places if place.is_dir()), None)) is None:
        raise UserError(
            f"--source {source}: has no folder {places[0].relative_to(source)} or {folder} with the files of "
            f"{task.name}; put them there as they are published, or name the folder that has them"
        )
    return found


def source_files(task: EvalTask, source: Path) -> list[Path]:
    """Return the published files that decide the tables of a task.

    Raises:
        UserError: There are none.
    """
    found = find_source(task, source)
    if task.family == "flip":
        names = sequence_files(FLIP_TASKS[task.task], task.split)
        return [path for stems in names if (path := find_file(found, stems)) is not None]
    if task.family == "tape":
        described = TAPE_TASKS[task.task]
        databases = [find_split(found, described, split) for split in described.splits]
        return [path / "data.mdb" if path.is_dir() else path for path in databases if path is not None]
    if task.family == CONTACTS:
        return sorted(path for path in found.iterdir() if path.is_file() and not path.name.startswith("."))
    return [found]


def _prepare_words(task: EvalTask, source: Path, out: Path) -> list[str]:
    if task.family == "deeploc2":
        words = ["prepare", "deeploc2", "--source", str(source), "--out", str(out), "--labels", task.split]
        # Partitions are made by homology, so that no protein of the test has a relative in training.
        return [*words, "--valid-partition", "3", "--test-partition", "4"]
    if task.family == CONTACTS:
        return ["prepare", CONTACTS, "--source", str(source), "--out", str(out)]
    words = ["prepare", task.family, task.task, "--source", str(source), "--out", str(out)]
    return [*words, "--split", task.split, "--allow-other-sizes"] if task.family == "flip" else words


def _table_of(task: EvalTask, folder: Path, split: str) -> Path:
    name = task.split if split == TEST and task.family == "tape" else split
    if not (path := folder / f"{name}.csv").is_file():
        raise UserError(f"{task.name}: has no proteins for {split!r}, which every mode needs; leave it out")
    return path


def _chosen(rows: list[dict[str, str]], most: int | None, seed: int) -> list[dict[str, str]]:
    """Return all rows, or of more than `most` those that the seed chooses, in their order."""
    if most is None or len(rows) <= most:
        return rows
    keys = stream_starts(seed, Purpose.SPLIT, np.arange(len(rows)))
    return [rows[row] for row in np.sort(np.argsort(keys, kind="stable")[:most]).tolist()]


def _write(path: Path, rows: list[dict[str, str]], first_residues: int | None) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "sequence": row["sequence"][:first_residues]} for row in rows)
