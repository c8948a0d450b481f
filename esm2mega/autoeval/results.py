"""Gathers what the units of a suite gave into rows with intervals, and writes the files of results.

Legend: ``k`` seeds, ``d`` resamples of the test proteins.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.autoeval.difference import Array, metric_difference
from esm2mega.files import OTHER_OUT, replacing
from esm2mega.finetune.bootstrap import percentiles
from esm2mega.train.loop import defined

RESULTS_CSV = "results.csv"

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """Holds what all seeds of one model and mode gave on a task.

    Attributes:
        model: Name of the model.
        mode: The mode.
        values: The headline metric of each seed, ``[k]``; NaN where it is not defined.
        draws: The same in resamples of the proteins, ``[k, d]``.
        metrics: All metrics, the mean over the seeds.
        predictions: File of the first seed's predictions, relative to the folder of results.
        commands: The commands of all seeds, see `esm2mega.autoeval.places`.
        plane: File of the embeddings in two dimensions, relative to the folder of results.
    """

    model: str
    mode: str
    values: list[float]
    draws: Array
    metrics: dict[str, float | None]
    predictions: str | None
    commands: list[list[str]]
    plane: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the row of the results."""
        low, high = percentiles(self.draws.mean(axis=0)) or (None, None)
        sd = defined(float(np.std(self.values, ddof=1))) if len(self.values) > 1 else None
        mean = defined(float(np.mean(self.values)))
        return {
            "row": "model",
            "model": self.model,
            "mode": self.mode,
            "value": mean,
            "low": low,
            "high": high,
            "seeds": {"values": [defined(value) for value in self.values], "mean": mean, "sd": sd},
            "metrics": self.metrics,
            "predictions": self.predictions,
            "plane": self.plane,
            "commands": self.commands,
        }


def baseline_row(
    name: str,
    metrics: Mapping[str, float | None],
    headline: str,
    draws: Array,
    predictions: str | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """Return the row of a baseline.

    Args:
        name: Its name.
        metrics: All metrics.
        headline: The one that judges the task.
        draws: The headline metric in resamples of the proteins, ``[d]``.
        predictions: File of its predictions, relative to the folder of results.
        note: What the reader has to know.
    """
    low, high = percentiles(draws) or (None, None)
    shown = {"value": metrics[headline], "low": low, "high": high, "metrics": dict(metrics)}
    return {"row": "baseline", "baseline": name, **shown, "predictions": predictions, "note": note}


def mean_metrics(each: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each metric over seeds; None where a seed has none."""
    found: dict[str, float | None] = {}
    for name in each[0]:
        values = [metrics[name] for metrics in each]
        known = [value for value in values if value is not None]
        found[name] = math.fsum(known) / len(known) if len(known) == len(values) else None
    return found


def differences(measured: Sequence[Measured], num_proteins: int) -> list[dict[str, Any]]:
    """Compare every two models in each mode on the same resamples of the proteins."""
    found = []
    for a, b in itertools.combinations(measured, 2):
        if a.mode != b.mode:
            continue
        result = metric_difference(a.values, b.values, a.draws, b.draws, num_proteins)
        low, high = result.interval or (None, None)
        found.append(
            {
                "a": {"model": a.model, "mode": a.mode},
                "b": {"model": b.model, "mode": b.mode},
                "difference": result.difference,
                "low": low,
                "high": high,
                "shown": result.is_shown,
            }
        )
    return found


_COLUMNS = ("task", "metric", "row", "name", "mode", "value", "low", "high", "sd", "source", "caveat")


def write_csv(folder: Path, results: Mapping[str, Any]) -> None:
    """Write every row of the results as a row of a table."""
    with replacing(folder / RESULTS_CSV, OTHER_OUT) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for task in results["tasks"]:
            for row in task["rows"]:
                name = row.get("model") or row.get("baseline")
                own = {"task": task["task"], "metric": row.get("metric", task["metric"]), "name": name}
                writer.writerow({**row, **own, "sd": row.get("seeds", {}).get("sd")})
