"""Which models of a suite are checkpoints of a run: by step and weights, whatever they are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from esm2mega.autoeval.of_run import benchmarks_of_run
from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.convert.checksum import weights_sha256
from esm2mega.errors import UserError
from tests.pages.demo import STEPS, write_demo_results
from tests.unit.conftest import TinyRun


@pytest.fixture
def run(finished: TinyRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.run_dir, tmp_path / "run"))


def suite(folder: Path, measured: dict[int, tuple[int | None, str]]) -> Path:
    """Results in which the models of the demonstration have other steps and weights, by their number."""
    results = write_demo_results(folder)
    for number, (step, weights) in measured.items():
        results["models"][number] |= {"step": step, "weights_sha256": weights}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_checkpoints_are_found_by_their_weights(run: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoints = layout.find_checkpoints(run)[0]
    own = [(layout.step_of(path), weights_sha256(path)) for path in checkpoints]
    assert own
    last = own[-1]
    found = benchmarks_of_run(run, suite(tmp_path / "results", {1: last}))
    assert (found.model, found.step) == (f"run@step_{STEPS[1]}", last[0])
    assert [model["name"] for model in found.suite.results["models"]] == [found.model]
    assert main(["plot", str(run), "--results", str(tmp_path / "results")]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "flip/gb1:two_vs_rest" in page.replace("<wbr>", "") and f"Checkpoint: {found.model}" in page
    assert f"checkpoints/step_{STEPS[1]}" in page
    assert f"checkpoints/step_{STEPS[0]}" not in page, "another model of the suite"
    capsys.readouterr()
    (tmp_path / "results" / "predictions" / "scl" / "1.csv").unlink()
    assert main(["plot", str(run), "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert "holds no results" in error and "scl/1.csv" in error and error.count("\n") == 1


@pytest.mark.parametrize("change", ["step", "weights"])
def test_other_weights_and_other_steps_are_not_the_run(change: str, run: Path, tmp_path: Path) -> None:
    last = layout.find_checkpoints(run)[0][-1]
    step, weights = layout.step_of(last), weights_sha256(last)
    other = (step + 1, weights) if change == "step" else (step, "0" * 64)
    with pytest.raises(UserError, match="none of its models has the step and the weights"):
        benchmarks_of_run(run, suite(tmp_path / "results", {1: other}))


def test_the_results_are_those_of_one_run(run: Path, capsys: Any) -> None:
    assert main(["plot", str(run), str(run), "--out", "x", "--results", "y"]) == 2
    assert "--results y is for the page of one run" in capsys.readouterr().err
