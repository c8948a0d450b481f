"""`quickstart` goes from a FASTA to a trained and evaluated model, its plot and embeddings, in minutes.

Every step prints what it does and the command that does it by hand, and runs it; the first failure ends all.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.config.scalars import as_word
from esm2mega.errors import MachineError, UserError
from esm2mega.processes import end_with_parent
from esm2mega.quickstart.simulate import FamilySpec, simulate_families
from esm2mega.report.plot import HTML_NAME, PNG_NAME

Say = Callable[[str], None]
print_line: Say = partial(print, flush=True)

PROCESSES = 2
STEPS = 1200
VALID_SIZE = 120
FAMILIES, MEMBERS = 16, 125
# Domain-sized proteins of close families: enough structure per residue for a small model to learn in minutes.
# Validation proteins are unseen members of families that training has seen.
FAMILY = FamilySpec(median_length=110, length_sigma=0.3, min_length=60, max_length=220)
LAST_LINES = 8
PREFIX = "esm2mega: "
"""Begins every line in which a command says how it ended."""


@dataclass(frozen=True)
class QuickstartResult:
    """Holds the paths of everything that was made, and the losses of the model and the unigram baseline."""

    fasta: Path
    store: Path
    run_dir: Path
    checkpoint: Path
    plot: Path
    embeddings: Path
    valid_loss: float
    unigram_loss: float

    @property
    def gain(self) -> float:
        """Return how many nats per residue the model is below the unigram baseline."""
        return self.unigram_loss - self.valid_loss


def quickstart(
    out: str | Path, seed: int = 1234, steps: int = STEPS, say: Say = print_line
) -> QuickstartResult:
    """Simulate proteins, prepare, pretrain `tiny` on two processes (TP=2), evaluate, plot and embed.

    Everything lies under `out`.

    Args:
        out: Directory to make; it must be absent or empty.
        seed: Seed of the data, the masks and the initial weights.
        steps: Number of optimizer steps; fewer for a mere trial of the machinery.
        say: Prints a line for the user.

    Raises:
        UserError: `out` holds files, or a step refused its input.
        MachineError: A step failed; the message holds its last lines.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} is not an empty directory; quickstart overwrites nothing: name another --out or remove it"
        )
    fasta, store, run_dir = out / "families.fasta", out / "store", out / "run"

    say(f"[1/6] Simulate {FAMILIES} protein families of {MEMBERS} members, also as UniRef-like clusters")
    say(
        "      "
        + shlex.join(["python", "-m", "esm2mega.quickstart.simulate", *_simulate_arguments(fasta, out, seed)])
    )
    made = simulate_families(fasta, FAMILIES, MEMBERS, seed, FAMILY, clusters_dir=out / "clusters")
    say(
        f"      {made.sequences:,} sequences, {made.residues:,} residues, {made.mean_identity:.0%} identical "
        f"to their ancestors; {made.uniref90_clusters:,} clusters at 90 %, {made.uniref50_clusters} at 50 %"
    )

    say(f"[2/6] Prepare the token stores, {VALID_SIZE} proteins held out for validation")
    prepare = ["prepare", "fasta", fasta, "--out", store, "--val-size", VALID_SIZE, "--seed", seed]
    _esm2mega(prepare, say)

    say(f"[3/6] Pretrain `tiny` for {steps} steps on {PROCESSES} CPU processes with tensor parallelism")
    _torchrun(
        ["pretrain", "--config", "pretrain_esm2_tiny", *pretrain_overrides(store, run_dir, seed, steps)], say
    )

    say("[4/6] Evaluate the checkpoint on the validation proteins")
    checkpoint = choose_checkpoint(run_dir).path
    metrics = out / "evaluation.json"
    # A checkpoint loads at any layout: one process is enough to evaluate.
    _esm2mega(["evaluate", checkpoint, "--data", store / "valid", "--out", metrics], say)

    say("[5/6] Plot the run")
    _esm2mega(["plot", run_dir], say)

    embeddings = out / "embeddings.h5"
    say("[6/6] Embed the validation proteins: a vector for each residue and each protein")
    _esm2mega(["embed", checkpoint, store / "valid", "--out", embeddings], say)

    valid_loss, unigram_loss = read_losses(metrics)
    result = QuickstartResult(
        fasta, store, run_dir, checkpoint, run_dir / HTML_NAME, embeddings, valid_loss, unigram_loss
    )
    say(summary(result))
    return result


def pretrain_overrides(store: Path, run_dir: Path, seed: int, steps: int) -> list[str]:
    """Return the overrides that fit the `tiny` configuration to this data set and to a few minutes."""
    settings: Mapping[str, object] = {
        "run_dir": run_dir,
        "seed": seed,
        "parallel.tensor_model_parallel_size": PROCESSES,
        "data.train": store / "train",
        "data.valid": store / "valid",
        "data.max_seq_length": 256,
        "train.micro_batch_tokens": 1024,
        "train.global_batch_tokens": 1024,
        "train.max_steps": steps,
        "train.eval_every": max(1, steps // 10),
        "train.log_every": max(1, steps // 150),
        "optim.lr": 1e-3,
        "schedule.warmup_steps": steps // 10,
    }
    return [as_word(key, value) for key, value in settings.items()]


def read_losses(metrics: Path) -> tuple[float, float]:
    """Return the loss and the unigram baseline of an evaluation file, in nats per residue."""
    numbers = json.loads(metrics.read_text(encoding="utf-8"))
    return float(numbers["loss"]), float(numbers["unigram_loss"])


def summary(result: QuickstartResult) -> str:
    """Return the closing lines: what was reached and how to go on with other proteins."""
    side = "below" if result.gain >= 0 else "ABOVE"
    pretrain = _torchrun_text(
        ["pretrain", "--config", "pretrain_esm2_tiny", "run_dir=runs/mine"]
        + ["data.train=my_store/train", "data.valid=my_store/valid"]
    )
    return f"""
Validation loss {result.valid_loss:.3f} nats per residue; residue frequencies: {result.unigram_loss:.3f}.
The model is {abs(result.gain):.3f} nats {side} that baseline, on unseen proteins of families it has seen.
Plot:       {result.plot} (open it in a browser), {result.plot.with_name(PNG_NAME).name}
Checkpoint: {result.checkpoint}
Embeddings: {result.embeddings}

Next, with your own proteins:
  esm2mega prepare fasta my_proteins.fasta.gz --out my_store --val-size 1000
  {pretrain}
  esm2mega plot runs/mine
The same command continues a run that was stopped. `esm2mega doctor` shows what this machine can do."""


def _simulate_arguments(fasta: Path, out: Path, seed: int) -> list[str]:
    options = {
        "--families": FAMILIES,
        "--members": MEMBERS,
        "--seed": seed,
        "--median-length": FAMILY.median_length,
        "--length-sigma": FAMILY.length_sigma,
        "--min-length": FAMILY.min_length,
        "--max-length": FAMILY.max_length,
        "--min-identity": FAMILY.min_identity,
        "--max-identity": FAMILY.max_identity,
        "--clusters": out / "clusters",
    }
    return [str(fasta), *(str(part) for option in options.items() for part in option)]


def _esm2mega(arguments: Sequence[object], say: Say) -> None:
    words = [str(argument) for argument in arguments]
    say("      " + shlex.join(["esm2mega", *words]))
    run_step(words[0], [sys.executable, "-m", "esm2mega", *words], say)


def _torchrun(arguments: Sequence[str], say: Say) -> None:
    say("      " + _torchrun_text(arguments))
    # `python -m torch.distributed.run` is the torchrun of this environment, on PATH or not; --standalone
    # takes a free port.
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(PROCESSES),
    ]
    run_step(arguments[0], [*launcher, "-m", "esm2mega", *arguments], say)


def _torchrun_text(arguments: Sequence[str]) -> str:
    launcher = [
        "OMP_NUM_THREADS=1",
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        str(PROCESSES),
        "-m",
        "esm2mega",
    ]
    return " ".join(launcher) + " " + shlex.join(arguments)


def run_step(name: str, command: Sequence[str], say: Say) -> None:
    """Run one command, pass its output on line by line, and turn a failure into an error with its last lines.

    Raises:
        UserError: The command ended with exit code 2.
        MachineError: It ended with any other exit code than 0, or could not start.
    """
    # One thread per process: two processes on two cores would otherwise fight over them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=end_with_parent,
        )
    except OSError as error:
        raise MachineError(f"{name} could not start: {error.strerror}: {command[0]}") from None
    said: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line.rstrip())
            say("      | " + line.rstrip())
        code = process.wait()
    except BaseException:
        # Ctrl-C or a closed terminal: give the launcher time to end its workers, then make sure.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if code != 0:
        kind = UserError if code == UserError.exit_code else MachineError
        # What the command itself said is better than the traceback that the launcher prints after it.
        reasons = [line.removeprefix(PREFIX) for line in said if line.startswith(PREFIX)]
        if reasons:
            raise kind(f"{name} failed with exit code {code}: {reasons[-1]}")
        raise kind("\n".join([f"{name} failed with exit code {code}; its last lines:", *said[-LAST_LINES:]]))
