"""Measures a model in training on benchmark tasks: embeds their proteins, and fits a small head to them.

The embeddings are computed by all processes together. The head is fitted on the first one, in a thread, while
training goes on.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import psutil

from esm2mega.autoeval.downstream.embedding import Vectors, embed_proteins
from esm2mega.autoeval.downstream.tables import Task, check_memory, open_tasks
from esm2mega.autoeval.probe.fit import Task as ProbeTask
from esm2mega.autoeval.probe.fit import fit_layer
from esm2mega.autoeval.probe.heads import LINEAR
from esm2mega.autoeval.probe.labels import TEST, VALID
from esm2mega.config.best_metric import HEADLINES, downstream_metric
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run
from esm2mega.errors import UserError
from esm2mega.finetune.metrics import check_packages
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.downstream import Measured

_LAYER = "last"
"""Names the only layer, for `fit_layer`."""


class TaskVectors:
    """Holds the vectors of a task's proteins, and gives them to `fit_layer` by the ids ``SPLIT/ROW``."""

    def __init__(self, task: Task, hidden_size: int) -> None:
        """Reserve the memory, and touch it: if it is not there, that shows before the training starts."""
        self._task = task
        self._arrays = {
            split: np.full((task.num_rows(split), hidden_size), np.nan, np.float32) for split in task.splits
        }

    def put(self, split: str, row: int, values: Vectors) -> None:
        """Store the vector of a protein, ``[h]``, or those of its residues, ``[L, h]``."""
        self._arrays[split][self._rows(split, row)] = values

    def vectors(self, layer: str, ids: Sequence[str]) -> Vectors:
        """Return the vectors of proteins, ``[n, h]``."""
        places = [self._place(name) for name in ids]
        return np.stack([self._arrays[split][row] for split, row in places])

    def residues(self, layer: str, name: str) -> Vectors:
        """Return the vectors of a protein's residues, ``[L, h]``."""
        split, row = self._place(name)
        return self._arrays[split][self._rows(split, row)]

    def _rows(self, split: str, row: int) -> Any:
        if not self._task.info.per_residue:
            return row
        first, stop = self._task.splits[split].offsets[row : row + 2]
        return slice(int(first), int(stop))

    @staticmethod
    def _place(name: str) -> tuple[str, int]:
        split, _, row = name.partition("/")
        return split, int(row)


class Downstream:
    """Measures the tasks of a run; see `esm2mega.train.downstream.Measurement` for what the loop calls."""

    def __init__(self, run: Run) -> None:
        """Open the tables and reserve the memory; all ranks call this together, before training starts.

        Args:
            run: The configuration; its section `downstream` names the tasks.

        Raises:
            UserError: A table is bad, or the vectors do not fit into the memory.
        """
        check_packages()
        self._run = run
        self.tasks = open_tasks(run.downstream, run.seed)
        hidden_size = shape_of(run.model).hidden_size
        check_memory(self.tasks, hidden_size, run.downstream.memory_gb)
        self.vectors: list[TaskVectors] = []

        def reserve() -> None:
            needed = 4 * hidden_size * sum(task.num_vectors for task in self.tasks)
            if needed > (free := psutil.virtual_memory().available):
                raise UserError(
                    f"downstream.tasks: their vectors take {needed / 1e9:.3g} GB, of which "
                    f"{free / 1e9:.3g} are free; lower downstream.max_train and downstream.max_test"
                )
            self.vectors = [TaskVectors(task, hidden_size) for task in self.tasks]

        on_one_rank(reserve)
        self._fit: Future[Measured] | None = None
        self._thread: threading.Thread | None = None
        self._is_forgotten = threading.Event()

    @property
    def banner(self) -> list[str]:
        """Return a line for each task."""
        return [
            f"measure  {task.name}: {HEADLINES[task.info.kind]} of a {task.info.kind} on "
            + ", ".join(f"{len(proteins):,} {split}" for split, proteins in task.splits.items())
            for task in self.tasks
        ]

    @property
    def fingerprint(self) -> str:
        """Return a hash of the proteins and their labels."""
        parts = (proteins.fingerprint for task in self.tasks for proteins in task.splits.values())
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def begin(self, step: int, model: list[Any], ranks: Ranks, abandon: Callable[[], bool]) -> bool:
        """Embed the proteins; on the main rank, begin to fit the heads in a thread.

        All ranks call this together, when nothing that was begun before is left to fit.
        """
        reasons: list[str | None] = []
        for number, task in enumerate(self.tasks):
            places = [(split, row) for split, each in task.splits.items() for row in range(len(each))]
            proteins = [task.splits[split].residues(row) for split, row in places]

            place = partial(self._put, self.vectors[number] if ranks.is_main else None, places)
            data, size = self._run.data, self._run.train.micro_batch_tokens
            per_residue, length = task.info.per_residue, data.max_seq_length
            reasons.append(embed_proteins(model, proteins, per_residue, length, size, ranks, place, abandon))
            if abandoned := reasons[-1] == "the run was stopped":
                return not abandoned
        if ranks.is_main:
            self._fit = Future()
            self._is_forgotten.clear()
            # As a daemon it does not hold up the end of a run that is stopped.
            self._thread = threading.Thread(
                target=self._run_fit, args=(self._fit, step, reasons), name="downstream", daemon=True
            )
            self._thread.start()
        return True

    @staticmethod
    def _put(
        vectors: TaskVectors | None, places: Sequence[tuple[str, int]], protein: int, values: Vectors
    ) -> None:
        assert vectors is not None  # the main rank alone is given any
        split, row = places[protein]
        vectors.put(split, row, values)

    def wait(self, seconds: float) -> bool:
        """Wait for the fit, at most so long; return whether none is going on.

        One that was forgotten counts, since it reads the vectors until its present task ends.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> Measured | None:
        """Return what was measured, once; None if nothing is ready."""
        if self._fit is None or not self._fit.done():
            return None
        fit, self._fit = self._fit, None
        return fit.result()

    def forget(self) -> None:
        """Drop what is being fitted; its thread ends when the task is fitted that it is at."""
        self._is_forgotten.set()
        self._fit = None

    def _run_fit(self, fit: Future[Measured], step: int, reasons: Sequence[str | None]) -> None:
        try:
            fit.set_result(self._measure(step, reasons))
        except BaseException as error:  # whoever takes the result raises it
            fit.set_exception(error)

    def _measure(self, step: int, reasons: Sequence[str | None]) -> Measured:
        record: dict[str, float | None] = {}
        best: dict[str, float | None] = {}
        words = []
        for task, vectors, reason in zip(self.tasks, self.vectors, reasons, strict=True):
            if self._is_forgotten.is_set():
                break
            headline = HEADLINES[task.info.kind]
            names = [split for split in (VALID, TEST) if split in task.splits]
            values: dict[str, float | None] = dict.fromkeys(names)
            if reason is None:
                values, reason = self._values(task, vectors, headline, values)
            record |= {f"{task.name}/{split}_{headline}": value for split, value in values.items()}
            best[downstream_metric(task.name)] = values[VALID]
            shown = ", ".join(
                f"{split} {'none' if value is None else f'{value:.4f}'}" for split, value in values.items()
            )
            words.append(
                f"step {step}: {task.name} {headline}: {shown}" + f" ({reason})" * (reason is not None)
            )
        return Measured(step, record, best, words)

    def _values(
        self, task: Task, vectors: TaskVectors, headline: str, undefined: dict[str, float | None]
    ) -> tuple[dict[str, float | None], str | None]:
        """Fit the head; return the headline of each split, and the reason why there is none.

        What fails here is said and ends no training: the tables were checked before it began.
        """
        probe = ProbeTask(LINEAR, self._run.seed, task.info, task.splits, vectors)
        try:
            metrics: Mapping[str, Mapping[str, float]] = fit_layer(probe, _LAYER).metrics
        except (UserError, MemoryError, ArithmeticError, ValueError, RuntimeError) as error:
            return undefined, " ".join(f"not measured: {str(error) or type(error).__name__}".split())
        found = {split: metrics[split][headline] for split in undefined}
        return {split: value if math.isfinite(value) else None for split, value in found.items()}, None
