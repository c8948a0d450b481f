"""The tutorials run as printed, with a few settings behind their commands that make them take seconds."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openpyxl
import pytest

from esm2mega.cli.app import main
from esm2mega.quickstart.simulate import FamilySpec, simulate_families
from tests import warm
from tests.cli.pages import ROOT, Command
from tests.cli.readme_walk import path_with_commands
from tests.cli.test_page_commands import check
from tests.tutorials.steps import ELSEWHERE, TUTORIALS, Step, do, steps

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

SHORT = (
    "data.max_seq_length=64 train.micro_batch_tokens=256 train.global_batch_tokens=512 "
    "schedule.warmup_steps=0"
)
SMALLEST = (
    "model.size=null model.num_layers=1 model.hidden_size=16 model.ffn_hidden_size=32 "
    "model.num_attention_heads=2"
)
# What stands behind a command in the small form, by a part of the command; the first that fits counts.
BEHIND = {
    "quickstart.simulate": "--families 3 --median-length 40 --min-length 30 --max-length 60",
    "train.max_steps=350": f"{SHORT} {SMALLEST} train.max_steps=3 train.eval_every=1 train.eval_batches=1",
    "esm2mega probe": "task.bootstrap=0",
    "pretrain": f"{SHORT} {SMALLEST} train.max_steps=2 train.eval_every=1 train.eval_batches=1",
    "finetune": f"{SHORT} train.max_steps=2 train.eval_every=2 data.limit=20 task.bootstrap=0",
}
# Left out of the small form: what they make is there already, or they take long and are tested elsewhere.
READY = {
    "esm2mega quickstart": "tests/unit/quickstart",
    "esm2mega plan": "tests/unit/plan",
    "esm2mega doctor": "tests/unit/doctor",
    "esm2mega plot": "tests/unit/report",
}


def small(step: Step) -> Step:
    """The step with further settings; what it sets itself comes first, and so does not count."""
    behind = next((text for part, text in BEHIND.items() if part in step.text), None)
    return Step(step.language, f"{step.text} {behind}") if behind and step.language == "bash" else step


def make_quickstart(folder: Path) -> None:
    """What `esm2mega quickstart` leaves behind, as far as a tutorial uses it, with an untrained model."""
    folder.mkdir()
    fasta = folder / "families.fasta"
    simulate_families(
        fasta, 2, 20, spec=FamilySpec(median_length=36, length_sigma=0.1, min_length=30, max_length=44)
    )
    words = ["pretrain", "--config", "pretrain_esm2_tiny", f"run_dir={folder / 'run'}", f"data.train={fasta}"]
    words += [
        *SHORT.split(),
        *SMALLEST.split(),
        "train.max_steps=1",
        "train.eval_every=0",
        f"data.cache_dir={folder / 'cache'}",
    ]
    assert main(words) == 0


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, str]]]:
    """The folder and the output of each tutorial, by its name."""
    python = tmp_path_factory.mktemp("commands") / "python"
    with warm.interpreter(python):
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("RANK", "WORLD_SIZE"))
            },
            "PATH": path_with_commands(python.parent, python),
            "PYTHON_EXEC": str(python),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        found = {}
        for page in TUTORIALS:
            folder = tmp_path_factory.mktemp(page.stem)
            if any(step.text == "esm2mega quickstart" for step in steps(page)):
                make_quickstart(folder / "quickstart")
            found[page.stem] = (folder, walk(page, folder, environment))
        yield found


def walk(page: Path, folder: Path, environment: dict[str, str]) -> str:
    output = ""
    for step in steps(page):
        if do(step, folder):
            continue
        if step.is_elsewhere or any(step.text.startswith(command) for command in READY):
            # Not run here; it exists with its options, and its configuration is accepted.
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                check(Command(step.text))
            continue
        done = subprocess.run(
            small(step).words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{page.name}: {step.text}\n{done.stdout}\n{done.stderr}"
        output += done.stdout + done.stderr
    return output


@pytest.mark.distributed
def test_candidates_are_ranked(walked: dict[str, tuple[Path, str]]) -> None:
    folder, output = walked["ranked-candidates"]
    assert "300 measured variants of a protein of" in output
    assert re.search(r"Spearman", output), "the zero-shot scores were not compared with the measurements"
    with (folder / "ranked.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sheet = openpyxl.load_workbook(folder / "variants.xlsx")["candidates"]
    assert {row["id"] for row in rows} == {row[0] for row in sheet.iter_rows(2, values_only=True)}
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    values = [float(row["fitness"]) for row in rows]
    assert values == sorted(values, reverse=True) and min(float(row["fitness_sd"]) for row in rows) > 0
    assert len((folder / "runs" / "variants" / "folds.csv").read_text().splitlines()) > 20
    probed = json.loads((folder / "runs" / "probe" / "results.json").read_text())
    assert {"rmse", "spearman"} <= set(probed["test"])


@pytest.mark.distributed
def test_a_model_is_pretrained_resumed_and_handed_on(walked: dict[str, tuple[Path, str]]) -> None:
    folder, output = walked["pretrain"]
    run = folder / "runs" / "mine"
    assert (run / "checkpoints" / "step_00000003" / "COMPLETE").is_file()
    assert "resumed from step_00000002 at step 2" in output
    assert {"loss", "unigram_loss"} <= set(json.loads((run / "evaluation.json").read_text()))
    assert (folder / "proteins.h5").is_file()
    assert json.loads((folder / "runs" / "mine_hf" / "config.json").read_text())["model_type"] == "esm"


def test_what_is_not_run_here_is_run_elsewhere() -> None:
    printed = [step.text for page in TUTORIALS for step in steps(page)]
    for part, test in ELSEWHERE.items():
        assert any(part in text for text in printed), part
        assert test is None or "slurm/pretrain.sbatch" in (ROOT / test).read_text()
    for command, tests in READY.items():
        assert any(text.startswith(command) for text in printed) and (ROOT / tests).is_dir()
