"""`autoeval` takes checkpoints through the field's benchmarks, with baselines and published figures beside.

A suite is a list of units (`esm2mega.autoeval.units`). Whatever stops it, the same command goes on where it
was, and the results are the same to the last byte, since nothing in them depends on time.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.autoeval.assays import find_assays, run_assays
from esm2mega.autoeval.baselines.fit import baselines_of
from esm2mega.autoeval.baselines.substitutions import zero_shot_baseline
from esm2mega.autoeval.eval_model import RANDOM, EvalModel, open_models
from esm2mega.autoeval.prediction_table import cells_of, read_predictions, write_predictions
from esm2mega.autoeval.probe.labels import TEST
from esm2mega.autoeval.published import published_figures
from esm2mega.autoeval.random_encoder import write_random_encoder
from esm2mega.autoeval.results import FORMAT, RESULTS_JSON, Measured, differences, mean_metrics, write_csv
from esm2mega.autoeval.task_data import RunCommand, TaskData, find_source, prepare_task
from esm2mega.autoeval.tasks import PROBE, ZERO_SHOT, EvalTask
from esm2mega.autoeval.together import alone
from esm2mega.autoeval.units import Commands, Outcome, Unit, run_unit, wild_type
from esm2mega.config.best_metric import less_is_better
from esm2mega.errors import UserError
from esm2mega.files import check_out, read_json, write_json
from esm2mega.finetune.bootstrap import bootstrap_headline, percentiles
from esm2mega.finetune.metrics import HEADLINES, Predictions, check_packages, metrics_of
from esm2mega.infer.work import differing
from esm2mega.train.loop import defined
from esm2mega.version import __version__

_REQUEST, _TIMES, _COMMANDS, _PREDICTIONS = "request.json", "times.json", "commands.sh", "predictions"
_RESAMPLES = 1000


@dataclass(frozen=True)
class SuiteRequest:
    """Says what is evaluated.

    Attributes:
        checkpoints: The models, as `esm2mega embed` takes them.
        tasks: The tasks.
        modes: The modes, each defined for every task.
        source: Folder of the published files.
        out: Folder of the results.
        limits: Most proteins of each split, besides those of a suite.
        seed: Seed of the first head, of the chosen proteins and of the resamples.
        seeds: Number of heads of each model.
        layers: Hidden states that a probe tries; empty for the last one.
        overrides: ``key=value`` for `esm2mega finetune`.
    """

    checkpoints: Sequence[str]
    tasks: Sequence[EvalTask]
    modes: Sequence[str]
    source: str
    out: str
    limits: dict[str, int]
    seed: int = 1234
    seeds: int = 1
    layers: Sequence[str] = ()
    overrides: Sequence[str] = ()


def run_suite(request: SuiteRequest, run_command: RunCommand, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not done yet, and write the results; all ranks call this together.

    Args:
        request: What is evaluated.
        run_command: Runs one command of the package in this process.
        say: Prints a line.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: A checkpoint or published file is missing, or `out` was begun with another request.
    """
    check_packages()
    out = Path(request.out)
    check_out(out / RESULTS_JSON)
    alone(lambda: [_find(task, Path(request.source)) for task in request.tasks])
    models = alone(lambda: _begin(request, out))
    suite = _Suite(request, models, out, run_command, say)
    results = {
        "format": FORMAT,
        "esm2mega": __version__,
        "seed": request.seed,
        "seeds": request.seeds,
        "modes": list(request.modes),
        "models": [model.described() for model in models],
        "tasks": [suite.task(task) for task in request.tasks],
    }
    alone(lambda: _write(out, results, suite.commands))
    return results


def _find(task: EvalTask, source: Path) -> object:
    return find_assays(source) if task.kind is None else find_source(task, source)


def _begin(request: SuiteRequest, out: Path) -> list[EvalModel]:
    """Open the models; an earlier start must have had the same request and the same weights."""
    models = open_models(request.checkpoints)
    asked = {
        **{name: value for name, value in asdict(request).items() if name != "out"},
        "tasks": [task.name for task in request.tasks],
        "task limits": [dict(task.limits) for task in request.tasks],
        "weights": {model.name: model.weights_sha256 for model in models},
    }
    noted = out / _REQUEST
    if noted.is_file():
        if changed := differing(read_json(noted, "choose another --out"), json.loads(json.dumps(asked))):
            raise UserError(f"{out}: was begun with another request: {changed}; choose another --out")
        earlier = read_json(out / "models.json", "choose another --out")["models"]
        return [EvalModel(**model) for model in earlier]
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: holds other files, and no {_REQUEST}; choose another --out")
    write_json(out / "models.json", {"models": [asdict(model) for model in models]})
    write_json(noted, asked)
    return models


class _Suite:
    """Runs the units of a suite."""

    def __init__(
        self,
        request: SuiteRequest,
        models: list[EvalModel],
        out: Path,
        run_command: RunCommand,
        say: Callable[[str], None],
    ) -> None:
        self._request, self._models, self._out = request, models, out
        self._run_command, self._say = run_command, say
        self.commands: list[list[str]] = []

    def task(self, task: EvalTask) -> dict[str, Any]:
        """Evaluate all models on a task, and return its entry in the results."""
        if task.kind is None:
            return self._assays(task)
        request = self._request
        limits = {**dict(task.limits), **request.limits}
        source, folder = Path(request.source), self._out / "data"
        data = prepare_task(task, source, folder, limits, request.seed, self._run_command, self._say)
        self.commands += data.commands
        measured = [
            self._measured(task, model, mode, data) for mode in request.modes for model in self._models
        ]
        rows = [each.row() for each in measured]
        metric = HEADLINES[task.kind]
        counts = {split: len(rows_of_split) for split, rows_of_split in data.rows.items()}
        if PROBE in request.modes:
            rows.append(self._random_row(task, data))
        rows += alone(lambda: self._baselines(task, data))
        rows += _published_rows(task.name, metric)
        data.release()
        return {
            "task": task.name,
            "kind": task.kind,
            "metric": metric,
            "less_is_better": less_is_better(metric),
            "num_proteins": counts,
            "limited": data.limited,
            "first_residues": task.first_residues,
            "leakage": None,
            "rows": rows,
            "differences": differences(measured, counts[TEST]),
        }

    def _measured(self, task: EvalTask, model: EvalModel, mode: str, data: TaskData) -> Measured:
        """Evaluate a model with every seed."""
        units = [self._unit(task, model, mode, seed) for seed in range(self._request.seeds)]
        outcomes = [self._run(unit, lambda unit, c: run_unit(unit, data, c)) for unit in units]
        return alone(lambda: self._gathered(task, units[0], outcomes, data))

    def _unit(self, task: EvalTask, model: EvalModel, mode: str, number: int) -> Unit:
        request = self._request
        folder = self._out / "work" / task.slug / model.name.replace(" ", "-")
        return Unit(
            *(model, mode, request.seed + number, folder / f"{mode}-{number}", folder / "embeddings"),
            tuple(request.layers),
            tuple(request.overrides),
        )

    def _run(self, unit: Unit, run: Callable[[Unit, Commands], Outcome]) -> Outcome:
        began = time.monotonic()
        commands = Commands(self._run_command, self._say)
        is_new = not alone(lambda: unit.folder.is_dir())
        outcome = run(unit, commands)
        self.commands += outcome.commands
        seconds = time.monotonic() - began

        def note() -> None:
            path = self._out / _TIMES
            times = read_json(path, "remove it") if path.is_file() else {}
            key = str(unit.folder.relative_to(self._out / "work"))
            if is_new or key not in times:
                write_json(path, {**times, key: round(seconds, 2)})

        alone(note)
        return outcome

    def _gathered(self, task: EvalTask, first: Unit, outcomes: Sequence[Outcome], data: TaskData) -> Measured:
        assert task.kind is not None
        headline = HEADLINES[task.kind]
        draws, values = [], []
        for outcome in outcomes:
            value = outcome.metrics[headline]
            values.append(np.nan if value is None else value)
            if outcome.predictions is not None:
                found = read_predictions(Path(outcome.predictions), data.info, data.splits[TEST])
                draws.append(_draws(found, data, self._request.seed))
        target = None
        if outcomes[0].predictions is not None:
            found = read_predictions(Path(outcomes[0].predictions), data.info, data.splits[TEST])
            name = f"{first.model.name.replace(' ', '-')}.{first.mode}.csv"
            target = self._write_predictions(task, name, found, data)
        return Measured(
            first.model.name,
            first.mode,
            values,
            np.stack(draws) if draws else None,
            outcomes[0].interval,
            mean_metrics([outcome.metrics for outcome in outcomes]),
            target,
            [_shell(command) for outcome in outcomes for command in outcome.commands],
        )

    def _write_predictions(self, task: EvalTask, name: str, found: Predictions, data: TaskData) -> str | None:
        """Write predictions for readers; those of contacts are maps, which have no place in a table."""
        if data.info.per_pair:
            return None
        target = f"{_PREDICTIONS}/{task.slug}/{name}"
        cells = cells_of(found, data.info, data.splits[TEST])
        write_predictions(self._out / target, cells, data.rows[TEST], data.columns)
        return target

    def _random_row(self, task: EvalTask, data: TaskData) -> dict[str, Any]:
        """Evaluate a model of the first one's shape that has learned nothing."""
        first, path = self._models[0], self._out / "work" / "random-weights"
        seed = self._request.seed
        alone(lambda: None if path.is_dir() else write_random_encoder(first.path, path, seed) and None)
        model = replace(first, name=RANDOM, checkpoint=RANDOM, path=str(path), step=None)
        row = self._measured(task, model, PROBE, data).row()
        kept = {name: row[name] for name in ("value", "low", "high", "metrics", "predictions")}
        return {"row": "baseline", "baseline": RANDOM, **kept, "note": f"a probe, shape of {first.name}"}

    def _baselines(self, task: EvalTask, data: TaskData) -> list[dict[str, Any]]:
        assert task.kind is not None
        headline, rows = HEADLINES[task.kind], []
        baselines = baselines_of(data.splits, data.info, self._request.seed)
        if ZERO_SHOT in self._request.modes:
            sequence = wild_type(data.rows[TEST][0]["sequence"])
            baselines.append(zero_shot_baseline(data.splits[TEST], sequence))
        for baseline in baselines:
            metrics = {name: defined(x) for name, x in metrics_of(baseline.predictions, data.info).items()}
            draws = _draws(baseline.predictions, data, self._request.seed)
            low, high = percentiles(draws) or (None, None)
            name = f"{baseline.name.replace(' ', '-')}.csv"
            rows.append(
                {
                    "row": "baseline",
                    "baseline": baseline.name,
                    "value": metrics[headline],
                    "low": low,
                    "high": high,
                    "metrics": metrics,
                    "predictions": self._write_predictions(task, name, baseline.predictions, data),
                    "note": baseline.note,
                }
            )
        return rows

    def _assays(self, task: EvalTask) -> dict[str, Any]:
        reference, folder = alone(lambda: find_assays(Path(self._request.source)))
        rows = []
        for model in self._models:
            unit = self._unit(task, model, task.modes[0], 0)
            found = self._run(unit, lambda unit, c: run_assays(unit, reference, folder, c))
            value = found.metrics["spearman"]
            commands = [_shell(command) for command in found.commands]
            metrics, mode = dict(found.metrics), task.modes[0]
            values = [float("nan") if value is None else value]
            rows.append(
                Measured(model.name, mode, values, None, found.interval, metrics, None, commands).row()
            )
        return {
            "task": task.name,
            "kind": None,
            "metric": "spearman",
            "less_is_better": False,
            "num_proteins": {},
            "limited": None,
            "first_residues": None,
            "leakage": None,
            "rows": rows + _published_rows(task.name, "spearman"),
            "differences": [],
        }


def _draws(found: Predictions, data: TaskData, seed: int) -> Any:
    """Return the headline metric in resamples of the test proteins, ``[d]``."""
    return bootstrap_headline(found, data.info, _RESAMPLES, seed)


def _published_rows(task: str, metric: str) -> list[dict[str, Any]]:
    return [{"row": "published", **asdict(figure)} for figure in published_figures(task, metric)]


def _shell(command: Sequence[str]) -> str:
    return shlex.join(["esm2mega", *command])


def _write(out: Path, results: dict[str, Any], commands: Sequence[Sequence[str]]) -> None:
    write_csv(out, results)
    lines = dict.fromkeys(_shell(command) for command in commands)
    (out / _COMMANDS).write_text("\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines, ""]))
    write_json(out / RESULTS_JSON, results)
