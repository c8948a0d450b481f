"""A world of one process; a small store, and a run on it with two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from esm2mega.config.schema import ParallelConfig, Run


@pytest.fixture
def world() -> Iterator[None]:
    """Process groups of one process, until the test ends."""
    from esm2mega.parallel.initialize import process_groups

    with process_groups(ParallelConfig(), seed=1):
        yield


@dataclass(frozen=True)
class TinyRun:
    """A finished run: read it, do not write into it."""

    run: Run
    train: Path
    valid: Path

    @property
    def run_dir(self) -> Path:
        return Path(self.run.run_dir)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Four fp64 steps on 60 random proteins, evaluated and saved after steps 2 and 4."""
    from esm2mega.data.store.prepare import prepare_fasta
    from esm2mega.train.pretrain import pretrain
    from tests.unit.runs import tiny_run

    folder = tmp_path_factory.mktemp("finished")
    rng = np.random.default_rng(3)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    fasta = folder / "random.fasta"
    with fasta.open("wb") as file:
        for number, length in enumerate(rng.integers(5, 60, 60)):
            file.write(b">p%d\n%s\n" % (number, rng.choice(letters, size=length).tobytes()))
    prepare_fasta([fasta], folder / "data", valid_size=15)
    train, valid = folder / "data" / "train", folder / "data" / "valid"
    changes = ("train.eval_every=2", "checkpoint.save_every=2")
    run = tiny_run(f"data.train={train}", f"data.valid={valid}", *changes, run_dir=folder / "run")
    pretrain(run)
    return TinyRun(run, train, valid)
