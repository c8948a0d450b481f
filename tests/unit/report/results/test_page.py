"""The page of benchmarks: self-contained, safe with any text, and with the numbers of its files."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from esm2mega.report.results.page import write_results_page
from esm2mega.report.results.predictions import classes_of, numbers_of, read_rows

SCRIPT = "<script>alert(1)</script>"
_EMPTY = {"meta", "rect", "path", "circle", "polygon", "polyline", "br"}


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
    assert "http" not in page and "@import" not in page and "url(" not in page
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
    assert "fewer proteins than published" in text
    assert "over pretraining" in page, "two models of one run have a curve"


def test_pictures_have_the_numbers_of_the_files(folder: Path) -> None:
    numbers = numbers_of(read_rows(folder / "numbers.csv"))
    assert numbers is not None and len(numbers.ids) == 30
    assert numbers.worst(1)[0][0] == f"{SCRIPT}7"
    rows = read_rows(folder / "classes.csv")
    found = classes_of(rows, per_residue=False)
    assert found is not None
    known, predicted = ([row[name] for row in rows] for name in ("label", "prediction"))
    assert found.counts == confusion_matrix(known, predicted, labels=found.names).tolist()
    assert len(found.errors) == sum(a != b for a, b in zip(known, predicted, strict=True))


def test_residues_that_do_not_count_are_left_out() -> None:
    rows = [
        {"id": "a", "label": "CE-H", "prediction": "CEHH"},
        {"id": "b", "label": "HH", "prediction": "CE"},
    ]
    found = classes_of(rows, per_residue=True)
    assert found is not None
    assert sum(map(sum, found.counts)) == 5
    assert found.errors == [("b", "2 residues", "2 wrong"), ("a", "3 residues", "0 wrong")]
