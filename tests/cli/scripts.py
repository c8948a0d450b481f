"""Runs the scripts of examples/ on small data, through a stand-in for Python."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.quickstart.simulate import FamilySpec, simulate_families
from tests import warm

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("data.max_seq_length=128", "train.micro_batch_tokens=512", "train.global_batch_tokens=1024")
SMALL_RUN = (*SMALL, "train.log_every=1", "schedule.warmup_steps=0")


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[None]:
    """The scripts, and torchrun for its ranks, take a stand-in for this interpreter."""
    python = folder / "python"
    with warm.interpreter(python), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON", str(python))
        patch.setenv("PYTHON_EXEC", str(python))
        yield


def write_proteins(folder: Path) -> Path:
    path = folder / "small.fasta"
    spec = FamilySpec(median_length=60, length_sigma=0.2, min_length=40, max_length=90)
    simulate_families(path, n_families=4, members=15, spec=spec)
    return path


def random_sequences(count: int, seed: int) -> list[str]:
    """Proteins of 20 to 49 standard residues."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in rng.integers(20, 50, count)]


def write_store(folder: Path) -> Path:
    path = folder / "store"
    prepare_fasta([write_proteins(folder)], path, valid_size=10)
    return path


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
