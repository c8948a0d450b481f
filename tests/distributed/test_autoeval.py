"""`autoeval` on files of FLIP: numbers done by hand, and the same ones after a kill, on two processes, in
another folder, and by its own script."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests import warm
from tests.flip_files import write_gb1, write_secondary_structure
from tests.infer_models import make_reference
from tests.ranks import end_ranks, run_ranks, start_ranks

pytestmark = pytest.mark.distributed

TASKS = "flip/gb1,flip/secondary_structure"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model and data, and the results of a suite that nothing stopped."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    folder = tmp_path_factory.mktemp("autoeval")
    make_reference(folder)
    write_gb1(folder / "flip" / "gb1")
    write_secondary_structure(folder / "secondary_structure")
    with pytest.MonkeyPatch.context() as patched:
        # Without MMseqs2, which takes seconds for the smallest files.
        patched.setenv("PATH", str(Path(sys.executable).parent))
        run_ranks(words(folder, "whole"), 1, folder / "output")
        yield folder


def words(folder: Path, out: str) -> list[str]:
    options = ["--tasks", TASKS, "--source", str(folder), "--out", str(folder / out), "--seeds", "2"]
    return ["-m", "esm2mega", "-v", "autoeval", str(folder / "run"), *options]


def results(folder: Path, out: str = "whole") -> dict[str, Any]:
    return json.loads((folder / out / "results.json").read_text())


def test_the_numbers_are_those_of_the_predictions(folder: Path) -> None:
    gb1, structure = results(folder)["tasks"]
    assert gb1["num_proteins"] == {"train": 24, "valid": 8, "test": 16}
    by_name = {row.get("model") or row["baseline"]: row for row in gb1["rows"] if row["row"] != "published"}
    assert set(by_name) >= {"random weights", "mean", "one-hot ridge"} and len(by_name) == 4
    for row in by_name.values():
        table = list(csv.DictReader((folder / "whole" / row["predictions"]).open()))
        labels, values = ([float(cells[name]) for cells in table] for name in ("label", "target"))
        expected = spearmanr(labels, values).statistic if np.ptp(values) else None
        # The same definition; only the order of sums differs.
        assert row["value"] == (None if expected is None else pytest.approx(expected, abs=1e-12))
        assert row["value"] is None or row["low"] <= row["value"] <= row["high"]
    plane = list(csv.DictReader((folder / "whole" / by_name["run"]["plane"]).open()))
    assert len(plane) == 16 and {"id", "label", "pca_1", "pca_2"} <= set(plane[0])
    model = next(row for row in structure["rows"] if row["row"] == "model")
    assert {row["label"] for row in csv.DictReader((folder / "whole" / model["plane"]).open())} <= set("HEC")
    table = list(csv.DictReader((folder / "whole" / model["predictions"]).open()))
    pairs = [
        pair
        for cells in table
        for pair in zip(cells["prediction"], cells["label"], strict=True)
        if pair[1] != "-"
    ]
    masks = [mask_of(folder, cells["id"]) for cells in table]
    assert len(pairs) == sum(mask.count("1") for mask in masks)
    assert model["value"] == pytest.approx(np.mean([a == b for a, b in pairs]), abs=1e-12)
    assert model["seeds"]["sd"] == 0.0, "ridge and logistic regression draw nothing"
    published = [row for row in structure["rows"] if row["row"] == "published"]
    assert any(row["model"] == "ESM-2 650M" and row["value"] == 0.855 for row in published)


def mask_of(folder: Path, name: str) -> str:
    lines = (folder / "secondary_structure" / "mask.fasta").read_text().split("\n")
    return lines[lines.index(f">{name}") + 1]


def test_the_table_holds_every_row(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "whole" / "results.csv").open()))
    expected = [(t["task"], row["value"]) for t in results(folder)["tasks"] for row in t["rows"]]
    assert [(row["task"], float(row["value"]) if row["value"] else None) for row in rows] == expected
    commands = (folder / "whole" / "commands.sh").read_text()
    assert commands.count("esm2mega prepare") == 2 and commands.count("esm2mega probe") == 2 * 4
    assert "tables are the first 62 residues of all proteins of\n#   esm2mega prepare flip gb1" in commands


def test_a_suite_goes_on_in_another_folder(folder: Path, tmp_path: Path) -> None:
    """Copied with the model and the data, and given by other paths, it finds everything but one table."""
    for name in ("whole", "run", "flip", "secondary_structure"):
        shutil.copytree(folder / name, tmp_path / name)
    out = tmp_path / "whole"
    (out / "results.json").unlink()
    for path in (*out.glob("work/flip-secondary*/task.json"), *out.glob("predictions/flip-secondary*/*.csv")):
        path.unlink()
    options = ["--tasks", TASKS, "--source", ".", "--out", "whole", "--seeds", "2"]
    done = warm.run(["-m", "esm2mega", "autoeval", "run", *options], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stdout.split("\n") if line.startswith("esm2mega ")], "it ran a command"
    expected = (folder / "whole" / "results.json").read_text()
    assert (out / "results.json").read_text() == expected.replace(str(folder), str(tmp_path)).replace(
        json.dumps(str(tmp_path / "run")), json.dumps(str(folder / "run"))
    ), "commands name the model where it is now, and the results as it was called first"


@pytest.mark.parametrize(
    "modes", ["zero-shot", pytest.param("probe,finetune,lora,zero-shot", marks=pytest.mark.slow)]
)
def test_the_script_gives_the_same_scores(modes: str, folder: Path, tmp_path: Path) -> None:
    """In an empty folder, from the tables alone: the published files are not there."""
    source = tmp_path / "source"
    write_gb1(source / "gb1")
    options = ["--source", "source", "--out", "out", "--limit-train", "12", "--limit-test", "8"]
    options += ["--limit-valid", "6"] + ["train.max_epochs=2"] * ("lora" in modes)
    words = ["-m", "esm2mega", "autoeval", str(folder / "run"), "--tasks", "flip/gb1", "--mode", modes]
    assert (done := warm.run([*words, *options], cwd=tmp_path)).returncode == 0, done.stderr
    shutil.rmtree(source)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "out" / "data", again / "data")
    shutil.copy(tmp_path / "out" / "commands.sh", again)
    program = tmp_path / "esm2mega"
    with warm.interpreter(tmp_path / "python"):
        program.write_text(f'#!/bin/sh\nexec {tmp_path}/python -m esm2mega "$@"\n')
        program.chmod(0o755)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.defpath}"}
        for code in (0, 2):
            command = ["/bin/bash", str(again / "commands.sh")]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
            assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"{again}/work exists; copy commands.sh and data into an empty folder")
    names = ("scores.csv", "probe/predictions.csv", "predictions.csv", "evaluation.json")
    made = {path.relative_to(again) for name in names for path in again.glob(f"work/**/{name}")}
    # A probe also of random weights, and of each fine-tuning two files.
    assert len(made) == (1 if modes == "zero-shot" else 7)
    for path in made:
        # Evaluations name checkpoint and table, which were in `out`.
        expected = (tmp_path / "out" / path).read_text().replace('"out/', '"')
        assert (again / path).read_text() == expected, path


@pytest.mark.slow
def test_a_killed_suite_goes_on_at_two_processes(folder: Path) -> None:
    """It is killed in the embedding of the second task, and goes on with another number of processes."""
    out = folder / "killed"
    ranks = start_ranks(words(folder, "killed"), 1, folder / "output-killed")
    try:
        limit = time.monotonic() + 60
        while not any(out.glob("work/flip-secondary*/*/embeddings/*")) and time.monotonic() < limit:
            time.sleep(0.01)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
    finally:
        end_ranks(ranks)
    (baseline,) = out.glob("predictions/flip-gb1*/one-hot-ridge.csv")
    fitted = baseline.stat().st_mtime_ns
    assert not (out / "results.json").exists(), "the suite was over before the kill"
    run_ranks(words(folder, "killed"), 2, folder / "output-resumed")
    for name in ("results.json", "results.csv"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert baseline.stat().st_mtime_ns == fitted, "a task that was finished is not done again"
