"""The page of benchmarks: self-contained, safe with any text, and with the numbers of its files."""

from __future__ import annotations

import csv
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import multilabel_confusion_matrix

from esm2mega.report.results.page import write_results_page
from esm2mega.report.results.pictures import pictures_of
from esm2mega.report.results.predictions import Flags, read_rows, targets_of
from tests.pages.demo import write_demo_page, write_demo_results

SCRIPT = "<script>alert(1)</script>"
_EMPTY = {"meta", "rect", "path", "circle", "polygon", "polyline", "br", "wbr"}


class Nesting(HTMLParser):
    """Every tag is closed in its order, and the attributes are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def model_row(model: str, value: float | None, predictions: str | None = None) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - 0.1, value + 0.1)
    seeds = {"values": [value], "mean": value, "sd": 0.01}
    numbers = {"value": value, "low": low, "high": high, "seeds": seeds, "metrics": {}}
    commands = [f"esm2mega embed {SCRIPT}"]
    return {
        "row": "model", "model": model, "mode": "probe", "predictions": predictions, "commands": commands,
        **numbers,
    }  # fmt: skip


def task(name: str, kind: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "task": name, "kind": kind, "metric": "spearman", "less_is_better": False, "limited": None,
        "num_proteins": {"train": 1000, "test": 30}, "first_residues": None, "leakage": None,
        "rows": rows, "differences": [], **more,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    labels, classes = rng.normal(size=30), rng.integers(0, 3, (2, 30))
    with (tmp_path / "numbers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "target"])
        writer.writerows([[f"{SCRIPT}{n}", labels[n], labels[n] + (5 if n == 7 else 0.1)] for n in range(30)])
    with (tmp_path / "classes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "prediction", "p_A", "p_B", "p_C"])
        writer.writerows([[f"p{n}", "ABC"[a], "ABC"[b], 0, 0, 0] for n, (a, b) in enumerate(classes.T)])
    return tmp_path


@pytest.fixture
def results() -> dict[str, Any]:
    models = [
        {
            "name": name,
            "checkpoint": SCRIPT,
            "weights_sha256": "a" * 64,
            "parameters": 7_500_000,
            "step": step,
        }
        for name, step in (("run@1", 100), ("run@2", 200), (SCRIPT, None))
    ]
    published = {
        "row": "published", "model": "ESM-2 650M", "mode": None, "metric": "mse", "value": 1.67,
        "source": SCRIPT, "caveat": "another metric", "comparable": False,
    }  # fmt: skip
    numbers = task(
        "flip/gb1:sampled",
        "regression",
        [model_row("run@1", 0.4), model_row("run@2", 0.5, "numbers.csv"), model_row(SCRIPT, None), published],
        differences=[
            {
                "a": {"model": "run@1", "mode": "probe"}, "b": {"model": "run@2", "mode": "probe"},
                "difference": 0.1, "low": -0.1, "high": 0.3, "shown": False,
            }
        ],
        leakage={"method": "mmseqs", "threshold": 0.3, "pairs": 1234},
        limited={"train": 500},
    )  # fmt: skip
    classes = task("flip/scl:mixed_soft", "classification", [model_row("run@2", 0.5, "classes.csv")])
    classes["rows"] += [model_row("run@1", None), model_row(SCRIPT, None)]
    return {"format": 1, "esm2mega": "1.0", "seed": 7, "models": models, "tasks": [numbers, classes]}


def test_the_page_is_whole_and_safe(results: dict[str, Any], folder: Path) -> None:
    page = write_results_page(results, folder).read_text(encoding="utf-8")
    parser = Nesting()
    parser.feed(page)
    assert not parser.open
    tags = {tag for tag, _ in parser.tags}
    assert "script" not in tags and not tags & {"link", "img", "iframe", "object"}
    for _, attributes in parser.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search("https?:", page) and "@import" not in page and "url(" not in page
    assert page.count("&lt;script&gt;") >= 5, "untrusted text is shown, escaped"
    text = re.sub(r"<[^>]+>", " ", page)
    for shown in (
        "within the noise",
        "another metric",
        "1,234 pairs",
        "not defined",
        "7.5 M",
        "none published",
    ):
        assert shown in text, shown
    assert "Fewer proteins than published" in text
    assert "over pretraining" in page, "two models of one run have a curve"


def test_the_page_of_every_kind_of_task(tmp_path: Path) -> None:
    """Nesting, ids that are no markup, and the notes that the reader needs."""
    page = write_demo_page(tmp_path).read_text(encoding="utf-8")
    parser = Nesting()
    parser.feed(page)
    assert not parser.open and "script" not in {tag for tag, _ in parser.tags}
    assert "default-src 'none'" in page, "a browser loads and runs nothing"
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    for shown in (
        "1,250 of 2,500 points",
        "the intervals of 95 % hold",
        "expected calibration error",
        "average precision",
        "principal components",
        "none published",
        "Leakage: 1,234 pairs",
        "the 6 most frequent of 7 classes",
        "best baseline: one-hot ridge",
        "sd 0.014 over 2 seeds",
        "differs",
        "within the noise",
    ):
        assert shown in text, shown
    for title in ("ROC", "Precision and recall", "Calibration of the probabilities", "Confusion"):
        assert text.count(title) >= 3, title
    # A picture says in words what it shows.
    charts = [attributes for tag, attributes in parser.tags if tag == "svg" and "role" in attributes]
    assert len(charts) > 20 and all(each["aria-label"] for each in charts)
    boxes = [attributes for _, attributes in parser.tags if attributes.get("class") == "scroll"]
    assert boxes and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_counts_of_flags_stand_on_the_page(tmp_path: Path) -> None:
    results = write_demo_results(tmp_path)
    (row,) = [r for t in results["tasks"] for r in t["rows"] if "deeploc2/2" in (r.get("predictions") or "")]
    page = "".join(pictures_of(row, "multilabel", tmp_path))
    (flags,) = targets_of(read_rows(tmp_path / row["predictions"]), "multilabel")
    assert isinstance(flags, Flags)
    tables = multilabel_confusion_matrix(flags.known, flags.scores >= 0.5)
    for name, ((tn, fp), (fn, tp)) in zip(flags.names, tables.tolist(), strict=True):
        cells = "".join(f"<td>{count:,}</td>" for count in (tp, fp, fn, tn))
        assert f'<th scope="row">{name}</th>{cells}' in page


def test_only_comparable_figures_are_beside_the_models(results: dict[str, Any], folder: Path) -> None:
    """A figure of another metric has no bar, and is not the best published one."""
    overview = write_results_page(results, folder).read_text().partition("<section")[0]
    assert "none that compares" in overview and "1.670" not in overview
