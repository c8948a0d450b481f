"""Makes the results of a suite that never ran: three checkpoints of one run, and a task of each kind."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.report.log import JsonlLog
from esm2mega.report.plot import Benchmarks, plot_run
from esm2mega.report.results.map_page import METHODS, write_map_page
from esm2mega.report.results.page import write_results_page
from esm2mega.report.results.suite import Suite

SCRIPT = "<script>alert('ids are text')</script>"
STEPS = (500, 1000, 2000)
MSE = "mean squared error, in place of Spearman; the split is not stated"
LOCATIONS = ("Cytoplasm", "Nucleus", "Extracellular", "Membrane", "Mitochondrion", "Plastid", "Lysosome")

Json = dict[str, Any]


def write_demo_page(folder: Path) -> Path:
    """Write predictions, and the page of their results."""
    return write_results_page(write_demo_results(folder), folder)


def write_demo_results(folder: Path) -> Json:
    """Write the files of the results into a folder, and return the content of ``results.json``."""
    rng = np.random.default_rng(5)
    models = [
        {"name": f"run@step_{step}", "checkpoint": f"runs/run/checkpoints/step_{step}",
         "weights_sha256": f"{step:064x}"[::-1], "parameters": 7_512_474, "step": step} for step in STEPS
    ]  # fmt: skip
    makers = (_regression, _classification, _residues, _multilabel)
    tasks = [make(folder, rng) for make in makers]
    results = {
        "format": 1,
        "esm2mega": "1.2.3",
        "seed": 1234,
        "seeds": 2,
        "modes": ["probe"],
        "models": models,
    }
    return {**results, "tasks": tasks}


def write_demo_report(folder: Path) -> Path:
    """Write the log of a fine-tuning, and its report with the benchmarks of two of its checkpoints."""
    rng = np.random.default_rng(6)
    names = ("accuracy", "balanced_accuracy", "mcc", "f1_macro", "f1_micro", "auroc")
    with JsonlLog(folder / "log.jsonl") as log:
        for step in range(5, 1001, 5):
            loss = 0.3 + 1.2 * math.exp(-step / 200) + rng.normal(0, 0.05)
            shown = {
                "lr": 5e-5 * (1 - step / 1001),
                "grad_norm": 0.3 + rng.random(),
                "tokens_per_second": 2.4e6 + 3e5 * rng.random(),
            }
            log.write({"kind": "train", "step": step, "loss": loss, **shown})
            if step % 100 == 0:
                value = 0.75 - 0.4 * math.exp(-step / 250) - 0.00005 * step
                metrics = {f"valid_{name}": value - 0.03 * n for n, name in enumerate(names)}
                log.write({"kind": "eval", "step": step, "valid_loss": 1.3 - value, **metrics})
        test = {f"test_{name}": 0.6 - 0.03 * n for n, name in enumerate(names)}
        baseline = {f"test_baseline_{name}": 0.3 for name in names}
        log.write({"kind": "test", "step": 700, "test_loss": 0.7, **test, **baseline})
    (folder / "config.yaml").write_text("task:\n  kind: classification\n  target_columns: [location]\n")
    results = write_demo_results(folder / "results")
    measured = Suite("results", folder / "results", results).of_models(["run@step_500", "run@step_1000"])
    return plot_run(folder, Benchmarks(measured, "run@step_1000", 1000, is_best=True)).html


def write_demo_map(folder: Path) -> Path:
    """Write the map of embeddings of some families, by both methods."""
    rng = np.random.default_rng(7)
    families = [LOCATIONS[n] for n in rng.integers(0, len(LOCATIONS), 600)]
    centres = {name: rng.normal(0, 4, 2) for name in LOCATIONS}
    planes = {name: np.array([centres[f] for f in families]) + rng.normal(0, 1, (600, 2)) for name in METHODS}
    ids = [SCRIPT, *(f"protein_{number}" for number in range(1, 600))]
    out = folder / "map.html"
    notes = ["layer_6 of proteins.h5", "coloured by location of labels.csv"]
    write_map_page(out, planes, ids, families, "Map of proteins.h5", notes)
    return out


def _regression(folder: Path, rng: np.random.Generator) -> Json:
    count = 2500
    labels = rng.gamma(2.0, 1.0, count)
    ids = [SCRIPT, *(f"Sequence{n}" for n in range(1, count))]
    rows = []
    for number in range(len(STEPS)):
        spread = rng.gamma(3.0, 0.35 - 0.08 * number, count)
        values = labels + rng.normal(0, spread)
        cells = zip(ids, labels, values, spread / 2, values - spread, values + spread, strict=True)
        columns = ("id", "label", "target", "target_sd", "target_low", "target_high")
        path = _write(folder, f"predictions/gb1/{number}.csv", columns, cells)
        plane = _plane(folder, f"embeddings/gb1/{number}.csv", rng, labels)
        rows.append(_model(number, 0.55 + 0.07 * number, 0.03, path, plane, "spearman"))
    rows += [
        _baseline("one-hot ridge", 0.75, "alpha=0.001"),
        _baseline("random weights", 0.31, "a probe, shape of run@step_500"),
        {**_baseline("mean", 0.0, None), "value": None, "low": None, "high": None},
        _published("ESM-1v", 0.82, None, True, "spearman"),
        _published("ESM-2 650M", 1.67, MSE, False, "mse"),
        _published("ESM-2 3B", 1.64, MSE, False, "mse"),
    ]  # fmt: skip
    leakage = {
        "method": "mmseqs",
        "threshold": 0.3,
        "pairs": 1234,
        "proteins": 57,
        "splits": {"train/test": 1234},
    }
    return _task(
        "flip/gb1:two_vs_rest", "regression", "spearman", rows, count, leakage=leakage, first_residues=62
    )


def _classification(folder: Path, rng: np.random.Generator) -> Json:
    count, names = 400, LOCATIONS
    known = rng.choice(len(names), count, p=np.array([8, 7, 6, 5, 4, 2, 1]) / 33)
    rows = []
    for number in range(len(STEPS)):
        logits = rng.normal(0, 1.0, (count, len(names))) + (1.2 + 0.7 * number) * np.eye(len(names))[known]
        shares = np.exp(2 * logits) / np.exp(2 * logits).sum(axis=1, keepdims=True)
        columns = ("id", "label", "prediction", *(f"p_{name}" for name in names))
        cells = (
            (f"Q{n:05d}", names[known[n]], names[shares[n].argmax()], *shares[n].tolist())
            for n in range(count)
        )
        path = _write(folder, f"predictions/scl/{number}.csv", columns, cells)
        plane = _plane(folder, f"embeddings/scl/{number}.csv", rng, [names[n] for n in known])
        rows.append(
            _model(number, float((shares.argmax(axis=1) == known).mean()), 0.04, path, plane, "accuracy")
        )
    rows.append(_baseline("k-mers logistic", 0.41, None))
    return _task(
        "flip/scl:mixed_soft", "classification", "accuracy", rows, count, limited={"train": 500, "test": 400}
    )


def _residues(folder: Path, rng: np.random.Generator) -> Json:
    rows, letters = [], np.array(list("CEH"))
    known = [rng.integers(0, 3, length) for length in rng.integers(40, 300, 60)]
    for number in range(len(STEPS)):
        cells = []
        for n, classes in enumerate(known):
            shown = np.where(
                rng.random(len(classes)) < 0.5 + 0.1 * number, classes, rng.integers(0, 3, len(classes))
            )
            label = np.where(rng.random(len(classes)) < 0.02, "-", letters[classes])
            cells.append((f"P{n:05d}", "".join(label), "".join(letters[shown])))
        path = _write(folder, f"predictions/ss/{number}.csv", ("id", "label", "prediction"), cells)
        rows.append(_model(number, 0.66 + 0.06 * number, 0.01, path, None, "accuracy"))
    rows += [
        _baseline("one-hot window", 0.62, None),
        _published("ProteinLM 3B", 0.75, None, True, "accuracy"),
    ]
    return _task("tape/secondary_structure:cb513", "token_classification", "accuracy", rows, 60)


def _multilabel(folder: Path, rng: np.random.Generator) -> Json:
    count, names = 300, LOCATIONS
    known = rng.random((count, len(names))) < np.array([0.5, 0.4, 0.3, 0.25, 0.2, 0.1, 0.02])
    rows = []
    for number in range(len(STEPS)):
        logits = rng.normal(0, 1.2, known.shape) + (1 + number) * (known - 0.6)
        shares = 1 / (1 + np.exp(-logits))
        cells = (
            (
                f"D{n}",
                ";".join(np.array(names)[known[n]]),
                ";".join(np.array(names)[shares[n] >= 0.5]),
                *shares[n],
            )
            for n in range(count)
        )
        columns = ("id", "label", "prediction", *(f"p_{name}" for name in names))
        path = _write(folder, f"predictions/deeploc2/{number}.csv", columns, cells)
        rows.append(_model(number, 0.5 + 0.08 * number, 0.03, path, None, "f1_micro"))
    rows.append(_baseline("k-mers logistic", 0.48, None))
    return _task("deeploc2:locations", "multilabel", "f1_micro", rows, count)


def _model(number: int, value: float, margin: float, path: str, plane: str | None, metric: str) -> Json:
    name = f"run@step_{STEPS[number]}"
    numbers = {"value": value, "low": value - margin, "high": value + margin}
    seeds = {"values": [value - 0.01, value + 0.01], "mean": value, "sd": 0.014}
    run = f"runs/run/checkpoints/step_{STEPS[number]}"
    commands = [f"esm2mega embed {run} test.csv --out embeddings/test.h5 --include pooled"]
    return {
        "row": "model", "model": name, "mode": "probe", **numbers, "seeds": seeds, "metrics": {metric: value},
        "predictions": path, "plane": plane, "commands": commands,
    }  # fmt: skip


def _baseline(name: str, value: float, note: str | None) -> Json:
    numbers = {"value": value, "low": value - 0.03, "high": value + 0.03, "metrics": {}}
    return {"row": "baseline", "baseline": name, **numbers, "predictions": None, "note": note}


def _published(model: str, value: float, caveat: str | None, comparable: bool, metric: str) -> Json:
    return {
        "row": "published", "model": model, "mode": "frozen, head not stated", "metric": metric,
        "value": value, "source": "Dallago et al. 2021, table 3", "caveat": caveat, "comparable": comparable,
    }  # fmt: skip


def _task(name: str, kind: str, metric: str, rows: Sequence[Json], count: int, **more: Any) -> Json:
    pairs = [(0, 1, True), (0, 2, True), (1, 2, False)]
    differences = [
        {
            "a": {"model": f"run@step_{STEPS[a]}", "mode": "probe"},
            "b": {"model": f"run@step_{STEPS[b]}", "mode": "probe"},
            "difference": 0.07 * (b - a), "low": 0.01 if shown else -0.02, "high": 0.16, "shown": shown,
        }
        for a, b, shown in pairs
    ]  # fmt: skip
    return {
        "task": name, "kind": kind, "metric": metric, "less_is_better": False, "limited": None,
        "num_proteins": {"train": 1381, "valid": 200, "test": count}, "first_residues": None, "leakage": None,
        "rows": list(rows), "differences": differences, **more,
    }  # fmt: skip


def _plane(folder: Path, name: str, rng: np.random.Generator, labels: Sequence[Any] | np.ndarray) -> str:
    centres = (
        {label: rng.normal(0, 2, 2) for label in sorted(set(labels))} if isinstance(labels, list) else {}
    )
    xy = rng.normal(0, 1, (len(labels), 2))
    xy += [centres.get(label, np.zeros(2)) for label in labels] if centres else np.outer(labels, [1, 0.3])
    cells = (
        (f"p{n}", label, *point) for n, (label, point) in enumerate(zip(labels, xy.tolist(), strict=True))
    )
    return _write(folder, name, ("id", "label", "pca_1", "pca_2"), cells)


def _write(folder: Path, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return name
