"""The scripts of examples/slurm do what they say; the commands and variables of Slurm are stand-ins.

`python -m tests.slurm` runs the same scripts on a real Slurm.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.scripts import (
    EXAMPLES,
    SMALL_RUN,
    environment,
    records,
    run,
    warm_python,
    write_store,
)
from tests.ranks import free_port

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
codes = [rank.wait() for rank in ranks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

# The state of the job is that of JOB_STATE, and written down with its number.
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") echo localhost ;;
  "show job") echo "JobId=$3 JobState=$JOB_STATE Reason=None" ;;
  *) echo "$@" >>{record} ;;
esac
"""

APPTAINER = """#!/usr/bin/env bash
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""


@pytest.fixture(scope="module", autouse=True)
def _warm_python(tmp_path_factory):
    with warm_python(tmp_path_factory.mktemp("python")):
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


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
        "SLURM_ARRAY_JOB_ID": "4242",
        "JOB_STATE": "RUNNING",
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
        "slurm/pretrain.sbatch", cwd=tmp_path, **slurm, STORE="/data", PYTHON=fake_python(tmp_path, show),
        OVERRIDES="train.max_steps=5 optim.lr=2e-4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = (
        "-m esm2mega pretrain --config pretrain_esm2_650M run_dir=runs/slurm_trial data.train=/data/train "
        "data.valid=/data/valid data.cache_dir=runs/prepared parallel.tensor_model_parallel_size=1 "
        "train.max_steps=5 optim.lr=2e-4\n"
    )
    assert (tmp_path / "rank0").read_text() == f"0 0 2 localhost 24242 {words}"
    assert (tmp_path / "rank1").read_text() == f"1 1 2 localhost 24242 {words}"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("script", "code", "requeued"),
    [
        *(("pretrain", code, code == 75) for code in (75, 1, 2, 137, 138)),
        # Here Slurm signals the process itself, so the script does not know but by the code.
        *(("finetune_array", code, code in (75, 138)) for code in (75, 1, 2, 137, 138)),
    ],
)
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_slurm_job_is_requeued_when_a_signal_stopped_it(script, code, requeued, state, slurm, tmp_path):
    """Unless it was cancelled, which signals it too: then it is completing and must not come back."""
    (tmp_path / "runs/flip/gb1/data").mkdir(parents=True)
    ended = run(
        f"slurm/{script}.sbatch", cwd=tmp_path, **{**slurm, "JOB_STATE": state}, STORE="s", FLIP="f",
        INIT_FROM="r", SLURM_ARRAY_TASK_ID="0", PYTHON=fake_python(tmp_path, f"exit {code}"),
    )  # fmt: skip
    assert ended.returncode == code
    requeued = requeued and state == "RUNNING"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        # The number of an array alone would mean all of its tasks.
        number = {"pretrain": "4242", "finetune_array": "4242_0"}[script]
        assert (tmp_path / "requeued").read_text() == f"requeue {number}\n"


def binds(tmp_path):
    """What the container sees of the host, of the form SOURCE:TARGET."""
    words = srun_words(tmp_path)
    pyxis = [word.partition("=")[2] for word in words if word.startswith("--container-mounts=")]
    return (pyxis or [words[words.index("--bind") + 1]])[0].split(",")


@pytest.mark.parametrize(
    ("container", "start"), [("pyxis", "--container-image=i.sif"), ("apptainer", "apptainer")]
)
def test_a_container_sees_every_path_that_the_job_names(container, start, slurm, tmp_path):
    """Of the store, the run, the configuration, its `defaults`, and what these and the overrides name."""
    names = ("work", "store", "runs", "conf", "models", "links", "cache", "shared", "wild")
    folders = {name: tmp_path / "disk" / name for name in names}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["models"] / "esm2.pt").touch()
    config = folders["conf"] / "mine.yaml"
    config.write_text(
        f"defaults: [base, common-1]\ninit_from: '{folders['models']}/esm2.pt'  # not /of/comments\n"
        f"data: {{train: [{folders['links']}/a, ../links/b]}}\nlogging: {{url: https://host/x}}\n"
    )
    third = folders["shared"] / "third.yaml"
    (folders["conf"] / "common-1.yaml").write_text(
        f"seed: 3\ndefaults:\n  # first\n  - '{third}'\n  - pretrain_esm2_8M\ntrain: {{max_steps: 5}}\n"
    )
    third.write_text(f"defaults: {config}\ndata:\n  wild_type: {folders['wild']}/wt.fasta\n")
    overrides = f"data.cache_dir=~/x checkpoint.resume={folders['runs']}/old@step_4"
    done = run(
        "slurm/pretrain.sbatch", cwd=folders["work"], **slurm, CONTAINER=container, IMAGE="i.sif",
        STORE=str(folders["store"]), RUN_DIR=f"{folders['runs']}/new/run", CONFIG=str(config),
        OVERRIDES=overrides, HOME=str(folders["cache"]), PYTHON=fake_python(tmp_path, "touch started"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folders["work"] / "started").exists()
    assert start in srun_words(tmp_path)
    assert sorted(binds(tmp_path)) == sorted(f"{folder}:{folder}" for folder in folders.values())


@pytest.mark.parametrize(
    ("mounts", "missing"),
    [
        ("{0}:{0},/data:/data", None),
        ("{0}", "/data/store"),
        ("{0}:{0}:ro,/lustre:/data:rw", None),
        ("/x:/x", "{0}"),
    ],
)
def test_mounts_of_the_user_show_every_path_or_are_refused(mounts, missing, slurm, tmp_path):
    done = run(
        "slurm/pretrain.sbatch", cwd=tmp_path, **slurm, STORE="/data/store", CONTAINER="apptainer",
        IMAGE="i.sif", MOUNTS=mounts.format(tmp_path), PYTHON=fake_python(tmp_path, "true"),
    )  # fmt: skip
    if missing is None:
        assert done.returncode == 0, done.stderr
        assert binds(tmp_path) == mounts.format(tmp_path).split(",")
    else:
        assert done.returncode == 2
        assert f"does not show {missing.format(tmp_path)}, which the job names" in done.stderr
        assert not (tmp_path / "srun.jsonl").exists()


def test_cpus_per_task_reaches_the_ranks(slurm, tmp_path):
    """Through the variable that srun reads, and as a number of threads, unless the caller set one."""
    show = 'echo "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS" >cpus'
    scripts = {
        "pretrain": {"STORE": "s"},
        "finetune_array": {"FLIP": "f", "INIT_FROM": "r", "SLURM_ARRAY_TASK_ID": "0"},
        "embed_array": {"CHECKPOINT": "r", "FASTA": "p.fasta", "SLURM_ARRAY_TASK_ID": "0"},
        "autoeval": {"MODELS": "r", "SOURCE": "s", "SLURM_ARRAY_TASK_ID": "0"},
        "evaluate": {},
    }
    (tmp_path / "p.fasta").write_text(">a\nMK\n")
    for script, variables in scripts.items():
        for threads, expected in (("", "6"), ("3", "3")):
            done = run(
                f"slurm/{script}.sbatch", cwd=tmp_path, **slurm, **variables, SLURM_CPUS_PER_TASK="6",
                PYTHON=fake_python(tmp_path, show), OMP_NUM_THREADS=threads,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert (tmp_path / "cpus").read_text() == f"6 {expected}\n", script
            (tmp_path / "cpus").unlink()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_the_ranks_are_ready_requeues_the_job(number, slurm, tmp_path):
    """It ends processes that have no handler yet."""
    python = fake_python(tmp_path, "touch started$RANK; exec sleep 60")
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm/pretrain.sbatch")], cwd=tmp_path, stdout=subprocess.PIPE,
        env=environment(**slurm, STORE="s", PYTHON=python),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("started*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(number)
        job.communicate(timeout=30)
    finally:
        job.kill()
    assert job.returncode == 128 + number
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"


def test_a_task_of_the_array_prepares_and_trains_its_own_task(slurm, tmp_path):
    show = 'echo "$*" >>words; while [[ $1 != --out ]]; do shift || exit 0; done; mkdir -p "$2"'
    variables = {
        "FLIP": "/FLIP",
        "INIT_FROM": "runs/mine",
        "TASKS": "meltome gb1:sampled",
        "OVERRIDES": "optim.lr=1e-4",
    }
    for _ in range(2):
        done = run(
            "slurm/finetune_array.sbatch", cwd=tmp_path, **slurm, **variables, OUT="flip",
            SLURM_ARRAY_TASK_ID="1", PYTHON=fake_python(tmp_path, show), PREPARE="--allow-other-sizes",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    prepare, *trainings = (tmp_path / "words").read_text().splitlines()
    assert prepare == (
        "-m esm2mega prepare flip gb1 --source /FLIP/gb1 --out flip/gb1_sampled/data "
        "--allow-other-sizes --split sampled"
    )
    # Two ranks of the stand-in, in each of two starts; the data are prepared once.
    assert trainings == 4 * [
        "-m esm2mega finetune --config flip_gb1 init_from=runs/mine run_dir=flip/gb1_sampled/run "
        "data.train=flip/gb1_sampled/data/train.csv data.valid=flip/gb1_sampled/data/valid.csv "
        "data.test=flip/gb1_sampled/data/test.csv optim.lr=1e-4"
    ]


def test_a_task_of_the_array_evaluates_one_benchmark_and_comes_back_after_a_signal(slurm, tmp_path):
    variables = {
        "MODELS": "runs/a runs/b",
        "SOURCE": "/data",
        "TASKS": "deeploc2 flip/gb1:sampled",
        "MODE": "probe,lora",
        "OPTIONS": "--limit-train 50 optim.lr=1e-4",
        "SLURM_NTASKS": "1",
    }
    for code in (0, 75):
        done = run(
            "slurm/autoeval.sbatch", cwd=tmp_path, **{**slurm, **variables}, SLURM_ARRAY_TASK_ID="1",
            PYTHON=fake_python(tmp_path, f'echo "$*" >>words; exit {code}'),
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert (tmp_path / "words").read_text().splitlines() == 2 * [
        "-m esm2mega autoeval runs/a runs/b --tasks flip/gb1:sampled --mode probe,lora --source /data "
        "--out runs/autoeval/flip-gb1-sampled --seeds 1 --limit-train 50 optim.lr=1e-4"
    ]
    assert (tmp_path / "requeued").read_text() == "requeue 4242_1\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_shards_hold_every_protein_once(compressed, slurm, tmp_path):
    text = "".join(f">p{number} >x\nMK\nLV\n" for number in range(7))
    fasta = tmp_path / "p.fasta"
    fasta.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    show = 'echo "$*" >>words; touch "$7"'
    for number in (0, 1, 2):
        done = run(
            "slurm/embed_array.sbatch", cwd=tmp_path, **{**slurm, "SLURM_NTASKS": "1"}, FASTA=str(fasta),
            CHECKPOINT="runs/mine", SHARDS="3", SLURM_ARRAY_TASK_ID=str(number), OUT="out",
            OPTIONS="--layers 4", PYTHON=fake_python(tmp_path, show),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    shards = [(tmp_path / "out" / f"shard_{number}_of_3.fasta").read_text() for number in range(3)]
    assert [shard.count(">p") for shard in shards] == [3, 2, 2]
    records = [record for shard in shards for record in shard.split(">p")[1:]]
    assert sorted(records) == text.split(">p")[1:]
    assert (tmp_path / "words").read_text().splitlines() == [
        f"-m esm2mega embed runs/mine {shard}.fasta --out {shard}.h5 --resume --layers 4"
        for shard in ("out/shard_0_of_3", "out/shard_1_of_3", "out/shard_2_of_3")
    ]
    # A FASTA of the same name with other proteins.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / fasta.name).write_bytes(fasta.read_bytes() + b"\n")
    done = run(
        "slurm/embed_array.sbatch", cwd=tmp_path, **{**slurm, "SLURM_NTASKS": "1"},
        FASTA=str(tmp_path / "other" / fasta.name), CHECKPOINT="runs/mine", SLURM_ARRAY_TASK_ID="0",
        OUT="out", PYTHON=fake_python(tmp_path, show),
    )  # fmt: skip
    assert done.returncode == 2 and "OUT=out holds shards of p.fasta, " in done.stderr, done.stderr


def test_evaluation_goes_on_after_a_task_that_fails_and_fails_in_the_end(slurm, tmp_path):
    show = 'echo "$*" >>words; [[ $4 != flip/gb1/run ]]'
    done = run(
        "slurm/evaluate.sbatch", cwd=tmp_path, **{**slurm, "SLURM_NTASKS": "1"}, OUT="flip",
        PYTHON=fake_python(tmp_path, show),
    )  # fmt: skip
    assert done.returncode == 1
    assert (tmp_path / "words").read_text().splitlines() == [
        f"-m esm2mega evaluate flip/{task}/run --data flip/{task}/data/test.csv --out flip/{task}/test.json"
        for task in ("gb1", "secondary_structure")
    ]


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("finetune_array", {"FLIP": "f", "INIT_FROM": "r"}, "TASKS has no number 9"),
        ("finetune_array", {"FLIP": "f"}, "set it to the run or checkpoint to start from"),
        ("autoeval", {"MODELS": "r", "SOURCE": "s"}, "TASKS has no number 9"),
        ("autoeval", {"MODELS": "r"}, "set it to the directory of the published files"),
        ("embed_array", {"CHECKPOINT": "r", "FASTA": "f"}, "there is no shard 9 of SHARDS=4"),
        ("embed_array", {"CHECKPOINT": "r"}, "set it to the FASTA with the proteins"),
    ],
)
def test_arrays_refuse_what_cannot_work(script, variables, message, slurm, tmp_path):
    refused = run(f"slurm/{script}.sbatch", cwd=tmp_path, **slurm, **variables, SLURM_ARRAY_TASK_ID="9")
    assert refused.returncode != 0
    assert message in refused.stderr
    assert not (tmp_path / "srun.jsonl").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set it to the directory made by esm2mega prepare fasta"),
        ({"STORE": "s", "CONTAINER": "docker"}, "CONTAINER=docker is not one of none, pyxis, apptainer"),
        ({"STORE": "s", "CONTAINER": "pyxis"}, "CONTAINER=pyxis needs it"),
        (
            {"STORE": "/absent/s", "CONTAINER": "pyxis", "IMAGE": "i"},
            "/absent/s, which the job names, does not exist",
        ),
    ],
)
def test_slurm_refuses_what_cannot_work(variables, message, slurm, tmp_path):
    refused = run("slurm/pretrain.sbatch", cwd=tmp_path, **slurm, **variables)
    assert refused.returncode != 0
    assert message in refused.stderr
    assert not (tmp_path / "srun.jsonl").exists()


@pytest.mark.distributed
def test_slurm_saves_and_requeues_before_the_time_limit(slurm, store, tmp_path):
    """As Slurm does it: USR1 to the batch script, which passes it on; the ranks save and end with 75."""
    overrides = " ".join([*SMALL_RUN, "train.max_steps=100000", "train.eval_every=0"])
    settings = {
        **slurm, "STORE": str(store), "CONFIG": "pretrain_esm2_tiny", "RUN_DIR": "run",
        "MASTER_PORT": str(free_port()), "OVERRIDES": overrides,
    }  # fmt: skip
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm/pretrain.sbatch")], cwd=tmp_path, env=environment(**settings),
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
