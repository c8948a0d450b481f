"""The README's recipes run as printed, one behind the other, and the Python of the docs after them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import pytest

from esm2mega.cli.app import cli
from esm2mega.data.store.token_store import TokenStore
from tests import warm
from tests.cli.pages import PAGES, README, ROOT, RUNS, TEXT, TUTORIALS, blocks, commands, name_of, walk
from tests.cli.readme_walk import STEPS_PER_START, path_with_commands, reduced, write_inputs

README_LINES = 250

# Commands of the README that the walk below does not run, by their first words: the test that runs them and
# how it is seen there. None stands for what no test can run: it needs a network, GPUs or a container.
RUN_ELSEWHERE = {
    "git clone": None,
    "cd esm2mega": None,
    "python3.11 -m venv": None,
    ". venv/bin/activate": None,
    "pip install": None,
    "docker build": None,
    "torchrun --standalone --nproc-per-node 8": None,
    "make test": None,
    "make quickstart": ("tests/cli/test_packaging.py", '["make", "quickstart"'),
    "esm2mega prove --layouts ci": ("tests/distributed/test_layouts.py", '["prove", "--layouts", "ci"'),
    "examples/pretrain_torchrun_multinode.sh": (
        "tests/cli/test_examples.py",
        "pretrain_torchrun_multinode.sh",
    ),
    "sbatch --nodes 4 examples/slurm/pretrain.sbatch": (
        "tests/cli/test_slurm_examples.py",
        "slurm/pretrain.sbatch",
    ),
}


RUN_WITH_A_PROGRAM = "export.md"
"""The Python of this page needs an exported program; tests/unit/export/test_command.py runs it."""


@dataclass(frozen=True)
class Walked:
    """Where the walk took place, and what each command printed."""

    folder: Path
    output: dict[str, str]

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "mine"

    def records(self, kind: str) -> list[dict[str, float]]:
        lines = (self.run_dir / "log.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walked]:
    python = tmp_path_factory.mktemp("commands") / "python"
    with warm.interpreter(python):
        yield walk_through(tmp_path_factory.mktemp("walk"), python)


def walk_through(folder: Path, python: Path) -> Walked:
    """Run the commands of the walk in a folder, through a stand-in for Python."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {
        "PATH": path_with_commands(python.parent, python),
        "PYTHON_EXEC": str(python),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    write_inputs(folder)
    output = {}
    for command, line in reduced():
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        output[command.line] = done.stdout + done.stderr
    return Walked(folder, output)


def test_the_walk_has_all_its_steps() -> None:
    done = [" ".join(word for word in command.words if word in cli.commands) for command in walk()]
    assert done == [
        *("prepare", "pretrain", "evaluate", "plot", "inspect", "inspect", "pretrain"),
        *("convert", "embed", "score"),
        *("finetune", "predict", "autoeval", "finetune", "lora"),
    ]


def test_every_command_of_the_readme_is_run() -> None:
    others = [command for command in commands(TEXT[README]) if command not in walk()]
    found = set()
    for command in others:
        text = shlex.join(command.words)
        starts = [start for start in RUN_ELSEWHERE if text.startswith(start)]
        assert len(starts) == 1, f"no test runs {command.line}"
        found.update(starts)
    assert found == set(RUN_ELSEWHERE)
    for page, text in filter(None, RUN_ELSEWHERE.values()):
        assert text in (ROOT / page).read_text(), f"{page} does not run {text}"


def test_readme_is_short() -> None:
    assert len(TEXT[README].splitlines()) <= README_LINES


def test_the_readme_names_every_command() -> None:
    assert [name for name in cli.commands if f"esm2mega {name}" not in TEXT[README]] == []


@pytest.mark.distributed
def test_walk_writes_what_the_docs_list(walked: Walked) -> None:
    last = walked.run_dir / "checkpoints" / f"step_{2 * STEPS_PER_START:08d}"
    assert (last / "COMPLETE").is_file()
    listing = next(block for block in blocks(TEXT[RUNS], "") if block.startswith("runs/mine/"))
    listed = set(re.findall(r"^  ([a-z.]+)(?:, ([a-z.]+))?(?=[ /])", listing, re.MULTILINE))
    names = {name for pair in listed for name in pair if name}
    # The listing is complete, besides the file that the README's own command put there. There is no incident,
    # and nothing that a fine-tuning alone writes.
    found = {path.name for path in walked.run_dir.iterdir()}
    assert names - {"incidents.jsonl", "splits", "test.json"} == found - {"evaluation.json"}
    assert len(TokenStore(walked.folder / "my_store" / "valid")) == 400


@pytest.mark.distributed
def test_walk_resumes_and_logs_each_step_once(walked: Walked) -> None:
    assert [record["step"] for record in walked.records("train")] == [1, 2, 3, 4]
    assert [record["step"] for record in walked.records("eval")] == [1, 2, 3, 4]
    resumed = [text for line, text in walked.output.items() if "train.max_steps=800" in line]
    assert "resumed from step_00000002 at step 2" in resumed[0]


@pytest.mark.distributed
def test_records_have_the_fields_that_the_docs_name(walked: Walked) -> None:
    flat = " ".join(TEXT[RUNS].split())
    for kind, pattern in (
        ("train", r"A training record has `([^`]+)`"),
        ("eval", r"an evaluation record `([^`]+)`"),
    ):
        found = re.search(pattern, flat)
        assert found is not None
        assert set(found.group(1).split(", ")) == set(walked.records(kind)[-1]) - {"kind", "time"}


@pytest.mark.distributed
def test_evaluation_and_inspection_say_what_the_readme_says(walked: Walked) -> None:
    numbers = json.loads((walked.run_dir / "evaluation.json").read_text())
    assert {"loss", "perplexity", "unigram_loss"} <= set(numbers)
    (checkpoint,) = (text for line, text in walked.output.items() if line == "esm2mega inspect runs/mine")
    assert "weights sha256" in checkpoint and "rotary.inv_freq" in checkpoint
    (store,) = (text for line, text in walked.output.items() if line == "esm2mega inspect my_store/train")
    assert "30 sequences" in store and "checksums hold" in store


@pytest.mark.distributed
def test_embeddings_and_scores_are_there(walked: Walked) -> None:
    with h5py.File(walked.folder / "my_proteins.h5") as file:
        assert len(file["ids"]) == 430
        assert file["offsets"][-1] == len(file["residue/layer_4"])
    assert len((walked.folder / "scan.csv").read_text().splitlines()) == 1 + 22 * 19
    assert (walked.folder / "scan.png").is_file()


@pytest.mark.distributed
def test_finetuned_models_predict_and_merge(walked: Walked) -> None:
    lines = (walked.folder / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 10
    assert lines[0].split(",")[0] == "id"
    step = f"step_{STEPS_PER_START:08d}"
    for run in ("fitness", "adapted"):
        assert (walked.folder / "runs" / run / "checkpoints" / step / "COMPLETE").is_file()
    assert (walked.folder / "adapted_whole" / "COMPLETE").is_file()


@pytest.mark.distributed
def test_benchmarks_have_results(walked: Walked) -> None:
    results = json.loads((walked.folder / "results" / "results.json").read_text())
    assert [task["task"] for task in results["tasks"]] == [
        "flip/gb1:two_vs_rest",
        "flip/secondary_structure:sampled",
    ]
    assert results["models"][0]["step"] == 2 * STEPS_PER_START


@pytest.mark.distributed
def test_python_blocks_of_the_docs_run(walked: Walked) -> None:
    for copy in ("one", "two"):
        shutil.copytree(walked.run_dir, walked.folder / "runs" / copy)
    code = {
        page: blocks(TEXT[page], "python")
        for page in PAGES
        if page not in TUTORIALS and page.name != RUN_WITH_A_PROGRAM
    }
    assert sum(map(len, code.values())) >= 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for page, texts in code.items():
        for text in texts:
            done = warm.run(["-c", text], environment, walked.folder)
            assert done.returncode == 0, f"{name_of(page)}\n{text}\n{done.stderr}"
            assert done.stdout.strip(), f"{name_of(page)}: prints nothing\n{text}"
