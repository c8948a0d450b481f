"""`compare` measures the checkpoints of two sides on the same proteins, and judges their difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.autoeval.difference import LEVEL, Difference, loss_difference, metric_difference
from esm2mega.autoeval.models import LOSS, Measurement, Model
from esm2mega.autoeval.sides import open_models
from esm2mega.config.best_metric import less_is_better
from esm2mega.config.run_name import joined_names
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, check_out, write_json
from esm2mega.finetune.metrics import check_packages
from esm2mega.finetune.user_code import GivenCode
from esm2mega.train.loop import defined

_SIDES = ("A", "B")


@dataclass(frozen=True)
class _Runs:
    """Holds the measured runs of all sides.

    Attributes:
        models: The checkpoints of A and of B.
        found: What was measured of each.
    """

    models: list[list[Model]]
    found: list[list[Measurement]]

    @property
    def first(self) -> Model:
        return self.models[0][0]

    @property
    def every(self) -> list[Measurement]:
        return [found for side in self.found for found in side]

    @property
    def counts(self) -> Any:
        """Return the number of labels of each protein, ``[n]``."""
        return self.found[0][0].losses.counts


def compare(
    sides: Sequence[str],
    data: str,
    out: str | Path | None = None,
    per_protein: bool = False,
    overrides: Sequence[str] = (),
    code: GivenCode | None = None,
) -> dict[str, Any] | None:
    """Compute how side B differs from side A, at any layout; all ranks call this together.

    Args:
        sides: The checkpoints of A and of B: names as for `esm2mega evaluate`, several joined by commas.
        data: Token store or sequence file for language models, table with labels for models of a task.
        out: JSON file for the result; None for no file.
        per_protein: Also write the loss of each protein.
        overrides: ``key=value`` over the configuration of each checkpoint.
        code: The user's own head and loss, if any of them was trained with such.

    Returns:
        The numbers that are written to `out`, without those of proteins; None on all but the main process.

    Raises:
        UserError: The checkpoints cannot be compared.
    """
    if out is not None:
        check_out(Path(out))
    elif per_protein:
        raise UserError("--per-protein is written to a file; name it by --out FILE.json")
    check_packages()
    names = [joined_names(side, text) for side, text in zip(_SIDES, sides, strict=True)]
    models = open_models(names, data, overrides, code or GivenCode())
    measured: dict[Path, Measurement | None] = {}
    for model in (model for side in models for model in side):
        if model.start.path not in measured:
            measured[model.start.path] = model.measure()
    found = [[each for model in side if (each := measured[model.start.path])] for side in models]
    if not all(found):
        return None
    runs = _Runs(models, found)
    result = _result(runs, data)
    if out is not None:
        proteins = {"proteins": list(_proteins(runs))} if per_protein else {}
        write_json(Path(out), {**result, **proteins}, OTHER_OUT)
    return result


def _result(runs: _Runs, data: str) -> dict[str, Any]:
    notes: list[str] = []
    differences = _differences(runs, notes)
    first, counts = runs.first, runs.counts
    decisive = differences.get(first.headline)
    result: dict[str, Any] = {
        side.lower(): [
            {"checkpoint": str(model.start.path), "step": model.start.state["step"], **_measures(found)}
            for model, found in zip(models, measured, strict=True)
        ]
        for side, models, measured in zip(_SIDES, runs.models, runs.found, strict=True)
    }
    return {
        **result,
        "data": data,
        "eval_recipe": first.recipe,
        "num_proteins": int(np.count_nonzero(counts)),
        "num_labels": int(counts.sum()),
        "level": LEVEL,
        "differences": {name: _as_json(each) for name, each in differences.items()},
        "notes": notes,
        "verdict": _verdict(first.headline, decisive, runs),
    }


def _as_json(found: Difference) -> dict[str, Any]:
    interval = None if found.interval is None else list(found.interval)
    return {**asdict(found), "interval": interval, "is_shown": found.is_shown}


def _measures(found: Measurement) -> dict[str, float | None]:
    return {name: defined(value) for name, value in {LOSS: found.loss, **found.metrics}.items()}


def _differences(runs: _Runs, notes: list[str]) -> dict[str, Difference]:
    """Return the difference in every measure, the loss first; one that cannot be compared becomes a note."""
    differences = {}
    every = [model for side in runs.models for model in side]
    if any(model.scale != runs.first.scale for model in every):
        notes.append("the losses are in different units, which follow from the labels of each training")
    elif not all(found.adds_up and np.array_equal(found.losses.counts, runs.counts) for found in runs.every):
        notes.append("the loss is no sum over proteins, so it has no interval")
    else:
        a, b = (np.stack([found.losses.sums for found in side]) for side in runs.found)
        differences[LOSS] = loss_difference(a, b, runs.counts)
    if (predictions := runs.found[0][0].predictions) is None:
        return differences
    n = len(np.unique(predictions.rows))
    drawn = [
        [model.resampled(found, runs.first) for model, found in zip(models, measured, strict=True)]
        for models, measured in zip(runs.models, runs.found, strict=True)
    ]
    for name in drawn[0][0]:
        values = [[_number(found.metrics[name]) for found in side] for side in runs.found]
        resampled = [np.stack([of_run[name] for of_run in side]) for side in drawn]
        differences[name] = metric_difference(values[0], values[1], resampled[0], resampled[1], n)
    return differences


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _verdict(measure: str, found: Difference | None, runs: _Runs) -> str:
    """Say in one sentence which side is better, or that no difference is shown."""
    proteins = int(np.count_nonzero(runs.counts))
    sizes = [len(side) for side in runs.models]
    if found is None or found.difference is None:
        return f"no difference shown: {measure} is not defined for both sides ({proteins} proteins)"
    if found.interval is None:
        return f"no difference shown: {measure} has no interval ({proteins} proteins)"
    low, high = found.interval
    level = f"{100 * LEVEL:.0f} % interval"
    numbers = f"{measure} {found.difference:+.4g}, {level} {low:+.4g} to {high:+.4g}"
    of = f"{proteins} proteins"
    if found.seed_noise is None:
        basis = f"{of}, one run on each side: the noise between seeds is not in it"
    else:
        deviation = f"standard deviation between seeds {found.seed_noise:.4g}"
        basis = f"{of}, {sizes[0]} and {sizes[1]} runs, {deviation}"
    if not found.is_shown:
        return f"no difference shown: B - A is {numbers} ({basis})"
    better = "B" if (found.difference < 0) == less_is_better(measure) else "A"
    return f"{better} is better: B - A is {numbers} ({basis})"


def _proteins(runs: _Runs) -> Iterator[dict[str, Any]]:
    """Yield the mean loss of each protein with labels, by side and run."""
    for row in np.flatnonzero(runs.counts).tolist():
        means = {
            side.lower(): [float(found.losses.sums[row] / found.losses.counts[row]) for found in of_side]
            for side, of_side in zip(_SIDES, runs.found, strict=True)
        }
        yield {"id": runs.first.id(row), "num_labels": int(runs.counts[row]), **means}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the command prints: the checkpoints, a table of the differences, notes, and the verdict."""
    for side in _SIDES:
        for run in result[side.lower()]:
            yield f"{side}: {run['checkpoint']} (step {run['step']})"
    level = f"{100 * result['level']:.0f} % interval"
    rows = [("measure", "A", "B", "B - A", level)]
    for name, each in result["differences"].items():
        interval = "null" if each["interval"] is None else "{:+.4g} to {:+.4g}".format(*each["interval"])
        numbers = (
            _shown(each[key], form) for key, form in (("a", ".5g"), ("b", ".5g"), ("difference", "+.4g"))
        )
        rows.append((name, *numbers, interval))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from (f"note: {note}" for note in result["notes"])
    yield result["verdict"]


def _shown(value: float | None, form: str) -> str:
    return "null" if value is None else format(value, form)
