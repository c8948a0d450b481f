"""`autoeval` takes checkpoints through the field's benchmarks, with baselines and published figures beside.

A suite is a list of units (`esm2mega.autoeval.units`). Whatever stops it, the same command goes on where it
was, and the results are the same to the last byte, since nothing in them depends on time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esm2mega.autoeval.assays import (
    blosum62_assays,
    find_assays,
    read_summary,
    resampled,
    run_assays,
    summary_of,
)
from esm2mega.autoeval.baselines.fit import baselines_of
from esm2mega.autoeval.baselines.substitutions import BLOSUM62, zero_shot_baseline
from esm2mega.autoeval.contacts import counts_of_maps
from esm2mega.autoeval.eval_model import RANDOM, EvalModel, slug_of
from esm2mega.autoeval.places import Places
from esm2mega.autoeval.plane import plane_labels, write_plane
from esm2mega.autoeval.prediction_table import (
    ID,
    cells_of,
    read_predictions,
    spread_cells,
    write_predictions,
)
from esm2mega.autoeval.probe.labels import TEST
from esm2mega.autoeval.probe.run import RESULTS
from esm2mega.autoeval.published import published_figures
from esm2mega.autoeval.random_encoder import write_random_encoder
from esm2mega.autoeval.request import SuiteRequest, begin, check_request
from esm2mega.autoeval.results import (
    FORMAT,
    Measured,
    baseline_row,
    differences,
    mean_metrics,
    write_csv,
)
from esm2mega.autoeval.script import TaskScript, script_of, shell_line
from esm2mega.autoeval.task_data import RunCommand, TaskData, prepare_task
from esm2mega.autoeval.tasks import PROBE, ZERO_SHOT, EvalTask
from esm2mega.autoeval.together import alone
from esm2mega.autoeval.units import Commands, Outcome, Unit, run_unit, wild_type
from esm2mega.config.best_metric import HEADLINES, less_is_better
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.data.leakage.leaks import find_leaks
from esm2mega.files import check_out, read_json, replacing, write_json
from esm2mega.finetune.bootstrap import bootstrap_contacts, bootstrap_headline
from esm2mega.finetune.metrics import Predictions, check_packages, metrics_of
from esm2mega.infer.proteingym import mean_of_means
from esm2mega.report.results.page import write_results_page
from esm2mega.report.results.suite import RESULTS_JSON
from esm2mega.train.loop import defined
from esm2mega.version import __version__

_TIMES, _COMMANDS = "times.json", "commands.sh"
_DATA, _PREDICTIONS, _PLANES = "data", "predictions", "embeddings"
_LEAKAGE, _TASK = "leakage.json", "task.json"
_RESAMPLES = 1000


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
    alone(lambda: check_request(request))
    models, places = alone(lambda: begin(request, out))
    suite = _Suite(request, models, places, run_command, say)
    results = {
        "format": FORMAT,
        "esm2mega": __version__,
        "seed": request.seed,
        "seeds": request.seeds,
        "modes": list(request.modes),
        "models": [model.described() for model in models],
        "tasks": [suite.task(task) for task in request.tasks],
    }
    script = script_of(suite.scripts, request.seed, world_size_from_environment())
    alone(lambda: _write(out, results, script))
    return results


class _Suite:
    """Runs the units of a suite."""

    def __init__(
        self,
        request: SuiteRequest,
        models: list[EvalModel],
        places: Places,
        run_command: RunCommand,
        say: Callable[[str], None],
    ) -> None:
        self._request, self._models, self._places = request, models, places
        self._out, self._source = Path(request.out), Path(os.path.abspath(request.source))
        self._run_command, self._say = run_command, say
        self._commands: list[list[str]] = []
        self.scripts: list[TaskScript] = []

    def task(self, task: EvalTask) -> dict[str, Any]:
        """Return a task's entry in the results, from an earlier start if that finished it."""
        path = self._out / "work" / task.slug / _TASK
        if not alone(path.is_file):
            self._commands = []
            entry = self._assays(task) if task.kind is None else self._labelled(task)
            done = {"entry": entry, "commands": self._commands}
            alone(lambda: write_json(path, done))
        kept = alone(lambda: read_json(path, "remove it"))
        entry, commands = kept["entry"], [self._places.shown(words) for words in kept["commands"]]
        self.scripts.append(TaskScript(task.name, entry["limited"], entry["first_residues"], commands))
        for row in entry["rows"]:
            if "commands" in row:
                row["commands"] = [shell_line(self._places.shown(words)) for words in row["commands"]]
        return dict(entry)

    def _labelled(self, task: EvalTask) -> dict[str, Any]:
        """Evaluate all models on a task with labelled proteins."""
        assert task.kind is not None
        request = self._request
        limits = {**dict(task.limits), **request.limits}
        folder = self._out / _DATA
        data = prepare_task(task, self._source, folder, limits, request.seed, self._run_command, self._say)
        self._commands += [self._places.noted(command) for command in data.commands]
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
        leakage = alone(lambda: _leakage(data)) if task.has_training else None
        data.release()
        return {
            "task": task.name,
            "kind": task.kind,
            "metric": metric,
            "less_is_better": less_is_better(metric),
            "num_proteins": counts,
            "limited": data.limited,
            "first_residues": task.first_residues,
            "leakage": leakage,
            "rows": rows,
            "differences": differences(measured, counts[TEST]),
        }

    def _measured(self, task: EvalTask, model: EvalModel, mode: str, data: TaskData) -> Measured:
        """Evaluate a model with every seed; without training there is nothing that a seed decides."""
        seeds = 1 if mode == ZERO_SHOT else self._request.seeds
        units = [self._unit(task, model, mode, seed) for seed in range(seeds)]
        outcomes = [self._run(unit, lambda unit, c: run_unit(unit, data, c)) for unit in units]
        return alone(lambda: self._gathered(task, units, outcomes, data))

    def _unit(self, task: EvalTask, model: EvalModel, mode: str, number: int) -> Unit:
        request = self._request
        folder = self._out / "work" / task.slug / model.slug
        return Unit(
            *(model, mode, request.seed + number, folder / f"{mode}-{number}", folder / "embeddings"),
            tuple(request.layers),
            tuple(request.overrides),
        )

    def _run(self, unit: Unit, run: Callable[[Unit, Commands], Outcome]) -> Outcome:
        began = time.monotonic()
        commands = Commands(self._run_command, self._say, self._places)
        is_new = not alone(lambda: unit.folder.is_dir())
        outcome = run(unit, commands)
        self._commands += outcome.commands
        seconds = time.monotonic() - began

        def note() -> None:
            path = self._out / _TIMES
            times = read_json(path, "remove it") if path.is_file() else {}
            key = str(unit.folder.relative_to(self._out / "work"))
            if is_new or key not in times:
                write_json(path, {**times, key: round(seconds, 2)})

        alone(note)
        return outcome

    def _gathered(
        self, task: EvalTask, units: Sequence[Unit], outcomes: Sequence[Outcome], data: TaskData
    ) -> Measured:
        assert task.kind is not None
        headline, seed, test, first = HEADLINES[task.kind], self._request.seed, data.splits[TEST], units[0]
        values = [np.nan if x is None else x for x in (outcome.metrics[headline] for outcome in outcomes)]
        files = [
            unit.folder / outcome.predictions
            for unit, outcome in zip(units, outcomes, strict=True)
            if outcome.predictions is not None
        ]
        if data.info.per_pair:  # maps, which are read one by one, and have no place in a table
            counts = [counts_of_maps(path, test) for path in files]
            draws, target = [bootstrap_contacts(each, _RESAMPLES, seed)[headline] for each in counts], None
        else:
            found = [read_predictions(path, data.info, test) for path in files]
            draws = [_draws(each, data, seed) for each in found]
            name = f"{first.model.slug}.{first.mode}.csv"
            target = self._write_predictions(task, name, found, data)
        return Measured(
            first.model.name,
            first.mode,
            values,
            np.stack(draws),
            mean_metrics([outcome.metrics for outcome in outcomes]),
            target,
            [command for outcome in outcomes for command in outcome.commands],
            self._write_plane(task, first, data),
        )

    def _write_plane(self, task: EvalTask, first: Unit, data: TaskData) -> str | None:
        """Write the embeddings of the test split in two dimensions, where a probe has made some."""
        if first.mode != PROBE or first.model.name == RANDOM:
            return None
        labels = plane_labels(data.shown_labels(TEST), data.columns, data.info.kind)
        if labels is None:
            return None
        target = f"{_PLANES}/{task.slug}/{first.model.slug}.csv"
        layer = read_json(first.folder / PROBE / RESULTS, "remove that folder")["layer"]
        embedded = first.embeddings / f"{TEST}.h5"
        seed, per_residue = self._request.seed, data.info.per_residue
        return target if write_plane(self._out / target, embedded, layer, labels, per_residue, seed) else None

    def _write_predictions(
        self, task: EvalTask, name: str, found: Sequence[Predictions], data: TaskData
    ) -> str:
        """Write predictions of the first seed for readers, and how far numbers of all seeds differ."""
        target = f"{_PREDICTIONS}/{task.slug}/{name}"
        cells = cells_of(found[0], data.info, data.splits[TEST])
        for cell, spread in zip(cells, spread_cells(found, data.info), strict=False):
            cell.update(spread)
        write_predictions(self._out / target, cells, data.shown_labels(TEST), data.columns)
        return target

    def _random_row(self, task: EvalTask, data: TaskData) -> dict[str, Any]:
        """Evaluate a model of the first one's shape that has learned nothing."""
        first, path = self._models[0], self._out / _DATA / slug_of(RANDOM)
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
        if ZERO_SHOT in self._request.modes and not data.info.per_pair:
            sequence = wild_type(data.rows[TEST][0]["sequence"])
            baselines.append(zero_shot_baseline(data.splits[TEST], sequence))
        for baseline in baselines:
            metrics = {name: defined(x) for name, x in metrics_of(baseline.predictions, data.info).items()}
            draws = _draws(baseline.predictions, data, self._request.seed)
            file, name = None, f"{slug_of(baseline.name)}.csv"
            if not data.info.per_pair:
                file = self._write_predictions(task, name, [baseline.predictions], data)
            rows.append(baseline_row(baseline.name, metrics, headline, draws, file, baseline.note))
        return rows

    def _assays(self, task: EvalTask) -> dict[str, Any]:
        seed, measured = self._request.seed, []
        reference, folder = alone(lambda: find_assays(self._source))
        known = alone(lambda: blosum62_assays(reference, folder))
        for model in self._models:
            unit = self._unit(task, model, ZERO_SHOT, 0)
            found = self._run(unit, lambda unit, c: run_assays(unit, reference, folder, c))
            assays = read_summary(summary_of(unit))
            measured.append(
                Measured(
                    *(model.name, ZERO_SHOT, [mean_of_means(assays)], resampled(assays, seed)[None]),
                    *(found.metrics, None, found.commands),
                )
            )
        rows = [each.row() for each in measured]
        if known is not None:
            metrics = {"spearman": defined(mean_of_means(known))}
            rows.append(baseline_row(BLOSUM62, metrics, "spearman", resampled(known, seed)))
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
            "differences": differences(measured, len({protein for _, protein, _ in assays})),
        }


def _draws(found: Predictions, data: TaskData, seed: int) -> Any:
    """Return the headline metric in resamples of the test proteins, ``[d]``."""
    return bootstrap_headline(found, data.info, _RESAMPLES, seed)


def _leakage(data: TaskData) -> dict[str, Any]:
    """Return how many proteins of different splits are related; an earlier start may have counted them."""
    path = data.folder.parent / _LEAKAGE
    if not path.is_file():
        splits = {split: [(row[ID], row["sequence"]) for row in rows] for split, rows in data.rows.items()}
        write_json(path, find_leaks(splits, threads=torch.get_num_threads()).summary())
    return read_json(path, "remove it")


def _published_rows(task: str, metric: str) -> list[dict[str, Any]]:
    return [{"row": "published", **asdict(figure)} for figure in published_figures(task, metric)]


def _write(out: Path, results: dict[str, Any], script: str) -> None:
    write_csv(out, results)
    write_results_page(results, out)
    with replacing(out / _COMMANDS) as partial:
        partial.write_text(script)
    write_json(out / RESULTS_JSON, results)
