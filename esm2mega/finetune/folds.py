"""Trains a model for each fold of a table, and gathers what each predicts of the fold that it has not seen.

The fold of a model is its test; the next fold chooses its best checkpoint, and the others train it. A start
that finds finished folds takes them as they are, as a finished run is taken.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.config.schema import Run
from esm2mega.config.split import FOLD
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.labels.splits import split_file
from esm2mega.errors import UserError
from esm2mega.files import replacing, write_json
from esm2mega.finetune.checkpoint import evaluate_task
from esm2mega.finetune.run import UserParts, finetune, read_splits
from esm2mega.parallel.errors import on_one_rank
from esm2mega.report.curves import number
from esm2mega.report.fold_dirs import PREDICTIONS, SUMMARY, fold_dir, fold_dirs
from esm2mega.report.log import LOG_NAME, TEST, read_log
from esm2mega.report.predicted import TEST_RESULT, read_tested

_COUNTS = ("step", "num_labels", "num_sequences")


def cross_validate(
    run: Run,
    count: int,
    parts: UserParts,
    opened: StartPoint | None = None,
    begun: float | None = None,
    given: Collection[str] | None = None,
) -> list[str]:
    """Train and test on every fold; all ranks call this together.

    Args:
        run: The configuration; its `data.split` is replaced.
        count: Number of folds.
        parts: As for `finetune`.
        opened: As for `finetune`.
        begun: As for `finetune`.
        given: As for `finetune`.

    Returns:
        A report for the reader, with mean and standard deviation of every metric.
    """
    folds = [_fold_of(run, fold, count) for fold in range(1, count + 1)]
    _check(folds, parts)
    results = []
    for fold in folds:
        finetune(fold, parts, opened=opened, begun=begun, given=given)
        out = Path(fold.run_dir) / TEST_RESULT
        # Somebody may have removed it since the fold was trained, or evaluated other proteins into it.
        if not on_one_rank(partial(_is_of_test, out)):
            evaluate_task(fold.run_dir, split_file(fold.run_dir, "test"), out, code=parts.code)
        results.append(on_one_rank(partial(_read, out)))
    metrics = _spread(results)
    on_one_rank(lambda: _write(Path(run.run_dir), results, metrics))
    lines = [f"{name}: {_described(values)}" for name, values in metrics.items()]
    return [*lines, f"out-of-fold predictions: {Path(run.run_dir) / PREDICTIONS}"]


def _fold_of(run: Run, fold: int, count: int) -> Run:
    changed = copy.deepcopy(run)
    changed.run_dir = str(fold_dir(run.run_dir, fold))
    changed.data.split = f"{FOLD}{fold}/{count}"
    return changed


def _check(folds: Sequence[Run], parts: UserParts) -> None:
    """Read all folds before the first one is trained: a class may be missing from one of them alone."""
    for fold, run in enumerate(folds, 1):
        try:
            read_splits(run.data, run.task, parts)
        except UserError as error:
            raise UserError(f"fold {fold} of {len(folds)}: {error}") from None


def folds_of(name: str) -> list[str]:
    """Return the runs of all folds where `name` is the directory of `cross_validate`, else `name` alone.

    All ranks call this together.
    """

    def find() -> list[str]:
        return list(map(str, fold_dirs(name))) or [name]

    return on_one_rank(find)


def _is_of_test(path: Path) -> bool:
    """Return whether a result is that of the test that the log of its fold has."""
    found = read_tested(path, "", "remove it, and start again")
    tests = [record for record in read_log(path.parent / LOG_NAME) if record.get("kind") == TEST]
    if found is None or not tests:
        return False
    return found.is_of(tests[-1]["step"], number(tests[-1], "test_loss"))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _spread(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean, standard deviation and values of each metric over the folds that define it.

    A fold that does not, such as one with constant predictions, has no correlation: its value is None.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for result in results for name in result):
        values = [number(result, name) for result in results]
        known = np.array([value for value in values if value is not None])
        if name in _COUNTS or not len(known):
            continue
        std = float(known.std(ddof=1)) if len(known) > 1 else None
        found[name] = {"mean": float(known.mean()), "std": std, "values": values}
    return found


def _described(values: dict[str, Any]) -> str:
    """Describe what `_spread` found of a metric."""
    spread = "" if values["std"] is None else f" +- {values['std']:.2g}"
    of_all = len(values["values"])
    missing = [str(fold) for fold, value in enumerate(values["values"], 1) if value is None]
    folds = f"{of_all} folds"
    if missing:
        folds = f"{of_all - len(missing)} of {of_all} folds; not defined in fold {', '.join(missing)}"
    return f"{values['mean']:.6g}{spread} over {folds}"


def _write(folder: Path, results: list[dict[str, Any]], metrics: dict[str, dict[str, Any]]) -> None:
    with (
        replacing(folder / PREDICTIONS) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "fold", "prediction", "label"])
        for fold, result in enumerate(results, 1):
            for entry in result["predictions"]:
                writer.writerow([entry["id"], fold, _cell(entry["prediction"]), _cell(entry["label"])])
    write_json(folder / SUMMARY, {"folds": len(results), "metrics": metrics})


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
