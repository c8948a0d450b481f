"""Small training runs through the command line, also one that is killed on its way."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.ranks import end_ranks, run_ranks, start_ranks

# L, H, A, F, d = 4, 48, 6, 104, 8: all different, and divisible as TP 2 and PP 2 and 4 need.
SHAPE = (
    "model.num_layers=4",
    "model.hidden_size=48",
    "model.num_attention_heads=6",
    "model.ffn_hidden_size=104",
)

SETTINGS = (
    *SHAPE,
    "data.max_seq_length=300",
    "train.micro_batch_tokens=512",
    "train.global_batch_tokens=2048",
    "train.max_steps=5",
    "train.log_every=1",
    "optim.lr=2e-3",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
)


def write_fasta(path: Path, count: int = 90) -> Path:
    """Random proteins of 1 to 420 residues, so that some are cropped; the tail of the alphabet occurs too."""
    rng = np.random.default_rng(7)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWCXBUZO", dtype=np.uint8)
    lengths = [1, 2, 420, *rng.integers(20, 330, count - 3)]
    with path.open("wb") as file:
        for number, length in enumerate(lengths):
            file.write(b">p%d\n%s\n" % (number, rng.choice(letters, size=length).tobytes()))
    return path


# Fields of a record that are times, not results.
CLOCK = ("time", "tokens_per_second", "step_time", "memory_gb")


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in lines]


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    run_dir: Path
    losses: list[float]
    grad_norms: list[float]


def train(run_dir: Path, data: Path, settings: Mapping[str, Any], world_size: int = 1) -> Outcome:
    """Run ``esm2mega pretrain`` with `SETTINGS` and `settings` on `world_size` processes."""
    arguments = ["-m", "esm2mega", "-v", "pretrain", f"run_dir={run_dir}", f"data.train={data}", *SETTINGS]
    arguments += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    run_ranks(arguments, world_size, run_dir / "output")
    return outcome(run_dir)


def outcome(run_dir: Path) -> Outcome:
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] == "train"]
    return Outcome(run_dir, [r["loss"] for r in records], [r["grad_norm"] for r in records])


def kill_after_step_5(arguments: Sequence[str], run_dir: Path, output: Path, seconds: int) -> None:
    """Start a run in one process and end it with SIGKILL as soon as the checkpoint of step 5 is complete."""
    (process,) = start_ranks(arguments, 1, output)
    try:
        complete = run_dir / "checkpoints" / "step_00000005" / "COMPLETE"
        deadline = time.monotonic() + seconds
        while not complete.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert complete.exists(), (output / "rank0.err").read_text()
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        end_ranks([process])
