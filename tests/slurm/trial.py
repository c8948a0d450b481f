"""Runs the examples of examples/slurm on a real Slurm of one node, and checks what they leave behind.

There is no container engine: `apptainer.sh` stands in for one, and shows to the job nothing of the trial's
files but what the example mounts.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import h5py

from tests.namespaces import TrialFailed, say
from tests.same_run import compare
from tests.slurm.cluster import Cluster
from tests.slurm.inputs import write_inputs

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "slurm"
# The node has no GPU: two processes with two CPUs each for training, one for what comes after it.
TWO_RANKS = ("--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=2")
ONE_RANK = ("--gpus-per-node=0", "--cpus-per-task=2")
SECONDS = 70
"""How long the training takes about, so that a time limit, which counts minutes, stops it."""
PATIENCE = 1200
"""Seconds that a job may take on a busy machine of two cores."""

CONFIG = """\
# Its paths are where no other option of the job points to.
defaults: pretrain_esm2_tiny
init_from: {folder}/models/start
data:
  max_seq_length: 256
train:
  micro_batch_tokens: 1024
  global_batch_tokens: 4096
  max_steps: {steps}
  log_every: 1
  eval_every: 0
schedule:
  warmup_steps: 5
checkpoint:
  save_every: 10
"""
SMALL = (
    "train.max_epochs=null train.max_steps=20 train.micro_batch_tokens=2048 train.global_batch_tokens=2048 "
    "train.log_every=1 train.eval_every=10 schedule.warmup_steps=2"
)


class Trial:
    """The examples, with the variables that all of them get."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.work = folder / "work"
        self.variables = {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "ignore",
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HIDDEN": str(folder),
            "STORE": str(folder / "data" / "store"),
        }

    def submit(self, script: str, *options: str, **variables: str) -> str:
        """Submit an example, and return the number of the job."""
        return self.cluster.submit(
            EXAMPLES / script, *options, cwd=self.work, variables={**self.variables, **variables}
        )

    def wait(self, number: str) -> list[dict[str, str]]:
        """Wait for a job, and fail unless it is completed with exit code 0."""
        jobs = self.cluster.wait(number, PATIENCE)
        for job in jobs:
            if (job["JobState"], job["ExitCode"]) != ("COMPLETED", "0:0"):
                end = "\n".join(Path(job["StdOut"]).read_text().splitlines()[-25:])
                raise TrialFailed(f"job {number}: {job['JobState']}, exit code {job['ExitCode']}\n{end}")
        return jobs

    def write_config(self, name: str, steps: int) -> Path:
        """Write a configuration file for pretraining."""
        path = self.folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CONFIG.format(folder=self.folder, steps=steps))
        return path


def inside(folder: Path) -> None:
    """Start Slurm, and run the examples on it one behind the other."""
    cluster = Cluster(folder / "slurm")
    trial = Trial(folder, cluster)
    for path in (trial.work, folder / "data", folder / "bin"):
        path.mkdir()
    (folder / "bin" / "apptainer").symlink_to(REPOSITORY / "tests" / "slurm" / "apptainer.sh")
    (folder / "image.sif").touch()
    write_inputs(folder / "data")
    # What this command was started with is not meant for the jobs.
    os.environ.pop("OMP_NUM_THREADS", None)
    say(f"{cluster.start()}, one node")

    steps = make_start(trial)
    unbroken = pretrain(trial, steps)
    pretrain_within_limits(trial, steps, unbroken)
    cancel(trial)
    after = run_arrays(trial, unbroken)
    check_arrays(trial, after)
    evaluate_benchmarks(trial, unbroken)
    say("all jobs ended as they should")


def make_start(trial: Trial) -> int:
    """Train the model that the others start from; return a number of steps that takes about `SECONDS`."""
    settings = "init_from=null train.max_steps=6 train.log_every=1 schedule.warmup_steps=1"
    config, run_dir = trial.write_config("start", 6), trial.folder / "models" / "start"
    number = trial.submit(
        "pretrain.sbatch", *TWO_RANKS, CONFIG=str(config), RUN_DIR=str(run_dir), OVERRIDES=settings
    )
    trial.wait(number)
    times = [record["step_time"] for record in records(run_dir)]
    return max(20, round(SECONDS / statistics.median(times)))


def pretrain(trial: Trial, steps: int) -> Path:
    """Pretrain without a container and without an interruption; look at the ranks while they run."""
    config, run_dir = trial.write_config("run", steps), trial.folder / "runs" / "unbroken"
    began = time.monotonic()
    number = trial.submit("pretrain.sbatch", *TWO_RANKS, CONFIG=str(config), RUN_DIR=str(run_dir))
    wait_for_step(trial, number, run_dir, 2)
    step = subprocess.run(["scontrol", "show", "step", f"{number}.0"], capture_output=True, text=True).stdout
    threads = [environment["OMP_NUM_THREADS"] for environment in ranks(number)]
    if "TresPerTask=cpu:2" not in step or threads != ["2", "2"]:
        raise TrialFailed(f"--cpus-per-task=2 does not reach the ranks: OMP_NUM_THREADS={threads}\n{step}")
    say("--cpus-per-task=2 reached both ranks: Slurm's step has cpu:2 for each task, OMP_NUM_THREADS is 2")
    trial.wait(number)
    say(f"pretraining, 2 ranks, no container: {steps} steps in {time.monotonic() - began:.0f} s")
    return run_dir


def pretrain_within_limits(trial: Trial, steps: int, unbroken: Path) -> None:
    """Pretrain in the stand-in for a container, with a time limit that is too short for it.

    The limit is given when the training is under way: how long a start takes depends on the machine.
    """
    run_dir = trial.folder / "runs" / "limited"
    number = trial.submit(
        "pretrain.sbatch", *TWO_RANKS, "--signal=B:USR1@10", CONTAINER="apptainer",
        IMAGE=str(trial.folder / "image.sif"), CONFIG=str(trial.folder / "conf" / "run.yaml"),
        RUN_DIR=str(run_dir),
    )  # fmt: skip
    wait_for_step(trial, number, run_dir, 2)
    minutes = int(trial.cluster.jobs(number)[0]["RunTime"].split(":")[-2])
    set_time_limit(number, minutes + 1)
    began = time.monotonic()
    while (job := trial.cluster.jobs(number)[0])["Restarts"] == "0":
        if (
            job["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
            or time.monotonic() > began + PATIENCE
        ):
            end = "\n".join(Path(job["StdOut"]).read_text().splitlines()[-25:])
            raise TrialFailed(f"the time limit did not requeue job {number}: {job['JobState']}\n{end}")
        time.sleep(0.5)
    stopped = f"time limit of {minutes + 1} min: requeued after step {len(records(run_dir))}"
    say(f"pretraining in the stand-in for a container, {stopped}")
    # One limit is enough to show it.
    set_time_limit(number, 60)
    (job,) = trial.wait(number)
    say(f"  resumed after {job['Restarts']} requeue: {compare(unbroken, run_dir, steps)}")


def cancel(trial: Trial) -> None:
    """Cancel a pretraining, which saves and must not come back, though it ends as at a time limit."""
    run_dir = trial.folder / "runs" / "cancelled"
    config = trial.folder / "conf" / "run.yaml"
    number = trial.submit("pretrain.sbatch", *TWO_RANKS, CONFIG=str(config), RUN_DIR=str(run_dir))
    wait_for_step(trial, number, run_dir, 2)
    subprocess.run(["scancel", number], check=True)
    trial.cluster.wait(number, PATIENCE)
    # Time for a job to come back that does.
    time.sleep(10)
    (job,) = trial.cluster.jobs(number)
    saved = sorted(path.parent.name for path in run_dir.glob("checkpoints/step_*/COMPLETE"))
    if (job["JobState"], job["Restarts"]) != ("CANCELLED", "0") or not saved:
        raise TrialFailed(
            f"job {number}, cancelled, is {job['JobState']}; restarts: {job['Restarts']}; {saved}"
        )
    say(f"pretraining, cancelled: {saved[-1]} is saved, and the job does not come back")


def set_time_limit(number: str, minutes: int) -> None:
    """Set the time limit of a job, which may be running."""
    subprocess.run(["scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}"], check=True)


def run_arrays(trial: Trial, pretrained: Path) -> dict[str, str]:
    """Submit fine-tuning, embedding, and an evaluation that waits for the fine-tuning; requeue one task."""
    data, out = trial.folder / "data", str(trial.folder / "flip")
    tuning = trial.submit(
        "finetune_array.sbatch", *ONE_RANK, INIT_FROM=str(pretrained), FLIP=str(data / "FLIP"), OUT=out,
        OVERRIDES=SMALL, PREPARE="--allow-other-sizes",
    )  # fmt: skip
    evaluation = trial.submit("evaluate.sbatch", *ONE_RANK, f"--dependency=afterok:{tuning}", OUT=out)
    embedding = trial.submit(
        "embed_array.sbatch", *ONE_RANK, "--array=0-2", SHARDS="3", CHECKPOINT=str(pretrained),
        FASTA=str(data / "proteins.fasta"), OUT=str(trial.folder / "embeddings"),
        OPTIONS="--layers 4 --pooling mean",
    )  # fmt: skip
    reason = trial.cluster.jobs(evaluation)[0]["Reason"]
    if reason != "Dependency":
        raise TrialFailed(f"the evaluation waits for {reason}, not for the fine-tuning")
    # What a time limit sends to the processes of a job, sooner; to the task that has the number of the array.
    wait_for_step(trial, tuning, trial.folder / "flip" / "secondary_structure" / "run", 2)
    subprocess.run(["scancel", "--signal=USR1", f"{tuning}_1"], check=True)
    return {"tuning": tuning, "evaluation": evaluation, "embedding": embedding}


def check_arrays(trial: Trial, numbers: dict[str, str]) -> None:
    """Wait for the jobs of `run_arrays`, and check their results."""
    tuned = trial.wait(numbers["tuning"])
    restarts = {job["ArrayTaskId"]: job["Restarts"] for job in tuned}
    if restarts != {"0": "0", "1": "1"}:
        raise TrialFailed(f"restarts of the tasks of the array: {restarts}")
    for task in ("gb1", "secondary_structure"):
        trained = [record["step"] for record in records(trial.folder / "flip" / task / "run")]
        if trained != list(range(1, 21)):
            raise TrialFailed(f"{task}: the log has the steps {trained}")
    say(
        "fine-tuning array over 2 FLIP tasks: done; the second was stopped by a signal, requeued, and resumed"
    )

    (evaluated,) = trial.wait(numbers["evaluation"])
    measured = []
    for task, metric in (("gb1", "spearman"), ("secondary_structure", "accuracy")):
        metrics = json.loads((trial.folder / "flip" / task / "test.json").read_text())
        if not math.isfinite(metrics[metric]):
            raise TrialFailed(f"{task}: {metric} is {metrics[metric]}")
        measured.append(f"{task} {metric} {metrics[metric]:.3f}")
    if max(job["EndTime"] for job in tuned) > evaluated["StartTime"]:
        raise TrialFailed("the evaluation did not wait for the fine-tuning")
    say(f"evaluation after the array (afterok): {', '.join(measured)}")

    trial.wait(numbers["embedding"])
    wanted = [
        line[1:].split()[0] for line in (trial.folder / "data/proteins.fasta").open() if line.startswith(">")
    ]
    found: list[str] = []
    for shard in range(3):
        with h5py.File(trial.folder / "embeddings" / f"shard_{shard}_of_3.h5") as file:
            found += [name.decode() for name in file["ids"]]
    if sorted(found) != sorted(wanted):
        raise TrialFailed(f"the shards hold {len(found)} proteins, and not each of the {len(wanted)} once")
    say(f"embedding array over 3 shards: {len(found)} proteins, each once")


def evaluate_benchmarks(trial: Trial, pretrained: Path) -> None:
    """Evaluate a model on a benchmark task in each task of an array; requeue one that fine-tunes."""
    out = trial.folder / "autoeval"
    number = trial.submit(
        "autoeval.sbatch", *ONE_RANK, "--array=0-1", MODELS=str(pretrained),
        SOURCE=str(trial.folder / "data" / "FLIP"), TASKS="flip/gb1:two_vs_rest flip/secondary_structure",
        MODE="probe,finetune", OUT=str(out),
        OPTIONS="train.max_steps=20 train.eval_every=10 train.log_every=1",
    )  # fmt: skip
    structure = "flip-secondary_structure"
    run_dir = out / structure / "work" / f"{structure}-sampled" / pretrained.name / "finetune-0" / "run"
    wait_for_step(trial, number, run_dir, 2)
    subprocess.run(["scancel", "--signal=USR1", f"{number}_1"], check=True)
    restarts = {job["ArrayTaskId"]: job["Restarts"] for job in trial.wait(number)}
    if restarts != {"0": "0", "1": "1"}:
        raise TrialFailed(f"restarts of the tasks of the array: {restarts}")
    trained = [record["step"] for record in records(run_dir)]
    if trained != list(range(1, 21)):
        raise TrialFailed(f"the fine-tuning of {structure} has logged the steps {trained}")
    measured = []
    for task in ("flip-gb1-two_vs_rest", structure):
        with (out / task / "results.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["row"] == "model"]
        if [row["mode"] for row in rows] != ["probe", "finetune"]:
            raise TrialFailed(f"{task}: results.csv has the models {rows}")
        measured += [f"{task} {row['mode']} {row['metric']} {float(row['value']):.3f}" for row in rows]
    say(f"benchmark array over 2 tasks: {', '.join(measured)}; the second was requeued, and went on")


def records(run_dir: Path) -> list[dict[str, float]]:
    """Return the training records of a run."""
    log = run_dir / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def wait_for_step(trial: Trial, number: str, run_dir: Path, step: int) -> None:
    """Wait until a run has logged a step; fail when its job ends before."""
    deadline = time.monotonic() + PATIENCE
    while len(records(run_dir)) < step:
        jobs = trial.cluster.jobs(number)
        if (
            any(job["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT") for job in jobs)
            or time.monotonic() > deadline
        ):
            end = "\n".join(Path(jobs[0]["StdOut"]).read_text().splitlines()[-25:])
            raise TrialFailed(f"job {number} did not reach step {step}\n{end}")
        time.sleep(0.2)


def ranks(number: str) -> list[dict[str, str]]:
    """Return the variables of the processes of a job that are ranks and no helpers of one."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_text(errors="replace").split("\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        environment = dict(word.split("=", 1) for word in words if "=" in word)
        if environment.get("SLURM_JOB_ID") == number and "RANK" in environment:
            found[int(process.name)] = (parent, environment)
    return [environment for parent, environment in found.values() if parent not in found]
