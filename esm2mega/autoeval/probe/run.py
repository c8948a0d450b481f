"""`probe` fits a small head to embeddings, layer by layer, and measures the best one on the test split.

Legend: ``n`` proteins, ``L`` residues of a protein, ``m`` target columns, ``k`` outputs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.autoeval.probe.embeddings import POOLED, RESIDUE, Embeddings
from esm2mega.autoeval.probe.fit import Fitted, Task, fit_layer
from esm2mega.autoeval.probe.heads import CNN, LINEAR, MLP
from esm2mega.autoeval.probe.labels import TEST, TRAIN, VALID, fewer_labels, read_splits
from esm2mega.config.best_metric import HEADLINES, less_is_better
from esm2mega.config.load import load_run_over
from esm2mega.config.schema import ModelConfig, Run
from esm2mega.config.task import NUMERIC_KINDS, PAIR_KIND, RESIDUE_KINDS, validate_task
from esm2mega.config.validate import check_ranges
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import check_out, file_sha256, replacing, write_json
from esm2mega.finetune.baseline import baseline_metrics
from esm2mega.finetune.bootstrap import bootstrap_intervals
from esm2mega.finetune.metrics import Metrics, check_packages
from esm2mega.finetune.output import table_cells
from esm2mega.report.progress import Progress
from esm2mega.train.loop import defined

HEADS = (LINEAR, MLP, CNN)
RESULTS, PREDICTIONS = "results.json", "predictions.csv"


@dataclass(frozen=True)
class ProbeRequest:
    """Says what `probe` does.

    Attributes:
        embeddings: HDF5 files of `esm2mega embed`, or of BioNeMo 1.
        labels: Folder or file, as for `read_splits`.
        out: Folder of the results.
        head: One of `HEADS`.
        layers: Names or numbers of layers that are tried; empty for all that the files have.
        split_column: As for `read_splits`.
        config: Path or name of a configuration whose `task`, `data` and `seed` hold; None for the defaults.
        overrides: ``key=value`` over it.
        overwrite: Whether results that are there already are replaced; else they are refused.
        max_residues: Most residues of the training proteins whose labels count, chosen by the seed; None for
            all.
    """

    embeddings: Sequence[str]
    labels: str
    out: str
    head: str = LINEAR
    layers: Sequence[str] = ()
    split_column: str | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    overwrite: bool = False
    max_residues: int | None = None


def probe(request: ProbeRequest) -> list[str]:
    """Fit the head to every layer, choose one by the validation split, and measure it on the test split.

    Returns:
        A report for the reader.

    Raises:
        UserError: The files, the labels and the task do not fit each other, or there are results already.
    """
    check_packages()
    out = Path(request.out)
    for path in (out / RESULTS, out / PREDICTIONS):
        check_out(path)
        if path.exists() and not request.overwrite:
            raise UserError(f"{path}: exists; replace it with --overwrite, or choose another --out")
    # There is no model, but a configuration has one; only its task and data are read.
    run = load_run_over(Run(model=ModelConfig(size="tiny")), request.overrides, request.config)
    _check(run, request)
    with Embeddings([Path(path) for path in request.embeddings]) as embeddings:
        kind = RESIDUE if run.task.kind in RESIDUE_KINDS else POOLED
        layers = _layers(embeddings, kind, request.layers)
        splits, info = read_splits(Path(request.labels), run.task, run.data, request.split_column)
        if request.max_residues is not None and info.per_residue:
            splits[TRAIN] = fewer_labels(splits[TRAIN], request.max_residues, run.seed)
        for split, proteins in splits.items():
            lengths = proteins.lengths.tolist() if info.per_residue else None
            embeddings.check(proteins.ids, f"{proteins.path} ({split})", lengths)
        task = Task(request.head, run.seed, info, splits, embeddings)
        found = {}
        with Progress(len(layers), "probe", "layer") as progress:
            for layer in layers:
                found[layer] = fit_layer(task, layer)
                value = found[layer].metrics[VALID][HEADLINES[info.kind]]
                progress.update(1, **{HEADLINES[info.kind]: f"{value:.4f}"})
    best = _best(found, HEADLINES[info.kind])
    result = _result(request, run, task, found, best)
    out.mkdir(parents=True, exist_ok=True)
    _write_predictions(out / PREDICTIONS, task, found[best])
    write_json(out / RESULTS, result)
    return list(_report(result, out, info))


def _check(run: Run, request: ProbeRequest) -> None:
    check_ranges(run)
    validate_task(run)
    kind = run.task.kind
    if kind == PAIR_KIND:
        raise UserError(
            "task.kind=contact needs pairs of residues; a probe has none, use `esm2mega finetune`"
        )
    if request.head == CNN and kind not in RESIDUE_KINDS:
        raise UserError(f"--head cnn is for labels of residues; task.kind={kind} has --head linear and mlp")


def _layers(embeddings: Embeddings, kind: str, asked: Sequence[str]) -> list[str]:
    """Return the names of the layers that are tried."""
    available = list(embeddings.layers[kind])
    if kind == POOLED:  # the mean of residues takes the place of vectors that are not there
        available += [name for name in embeddings.layers[RESIDUE] if name not in available]
    if not available:
        raise UserError(
            "labels of residues need vectors of residues, which these files do not hold; embed with "
            "--include residue"
        )
    chosen = [f"layer_{name}" if name.isdecimal() else name for name in asked]
    if unknown := [name for name in chosen if name not in available]:
        raise UserError(f"--layers {unknown[0]}: there are {', '.join(available)}; name some of them")
    return chosen or available


def _best(found: Mapping[str, Fitted], headline: str) -> str:
    """Return the layer with the best validation metric; of equal ones the first, and NaN comes last."""

    def rank(layer: str) -> float:
        value = found[layer].metrics[VALID][headline]
        return math.inf if math.isnan(value) else value if less_is_better(headline) else -value

    return min(found, key=rank)


def _result(
    request: ProbeRequest, run: Run, task: Task, found: Mapping[str, Fitted], best: str
) -> dict[str, Any]:
    info = task.info
    result: dict[str, Any] = {
        "embeddings": {path: file_sha256(Path(path)) for path in request.embeddings},
        "labels": request.labels,
        "kind": info.kind,
        "targets": info.names if info.kind in NUMERIC_KINDS else info.output_names,
        "head": task.head,
        "seed": run.seed,
        "max_residues": request.max_residues,
        "num_proteins": {name: len(split) for name, split in task.splits.items()},
        "headline": HEADLINES[info.kind],
        "layer": best,
        "layers": {
            layer: {"chosen": each.chosen, VALID: _as_json(each.metrics[VALID])}
            for layer, each in found.items()
        },
    }
    for name, predictions in found[best].predictions.items():
        intervals = bootstrap_intervals(predictions, info, run.task.bootstrap, run.seed)
        result[name] = {
            **_as_json(found[best].metrics[name]),
            **_as_json(baseline_metrics(predictions, info)),
            "intervals": {metric: list(interval) for metric, interval in intervals.items()},
        }
    return result


def _as_json(metrics: Metrics) -> dict[str, float | None]:
    return {name: defined(value) for name, value in metrics.items()}


def _write_predictions(path: Path, task: Task, best: Fitted) -> None:
    """Write the predictions of the test split, else of the validation split, in the form of `predict`."""
    name = TEST if TEST in best.predictions else VALID
    split, found = task.splits[name], best.predictions[name]
    values = np.split(found.values, split.offsets[1:-1]) if task.info.per_residue else found.values
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = None
        for protein, each in zip(split.ids, values, strict=True):
            row = {"id": protein, **table_cells(each, task.info)}
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


def _report(result: Mapping[str, Any], out: Path, info: TargetInfo) -> Iterator[str]:
    headline = result["headline"]
    for layer, each in result["layers"].items():
        chosen = ", ".join(f"{key} {value:g}" for key, value in _first_settings(each["chosen"]).items())
        mark = " *" if layer == result["layer"] and len(result["layers"]) > 1 else ""
        yield (
            f"{layer}: validation {headline} {_shown(each[VALID][headline])}"
            + f" ({chosen})" * bool(chosen)
            + mark
        )
    name = TEST if TEST in result else VALID
    low, high = result[name]["intervals"].get(headline, (None, None))
    interval = "" if low is None else f" (95 % interval {low:.4f} to {high:.4f})"
    baseline = result[name].get(f"baseline_{headline}")
    beside = "" if baseline is None else f"; from the labels alone {baseline:.4f}"
    yield f"{name} {headline} {_shown(result[name][headline])}{interval}{beside}"
    yield f"{out / RESULTS}, {out / PREDICTIONS}"


def _first_settings(chosen: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return what was chosen, if there is one target; several are in the file of results alone."""
    return {key: value for key, value in chosen[0].items() if key != "valid_loss"} if len(chosen) == 1 else {}


def _shown(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"
