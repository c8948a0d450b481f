"""What the tests of this folder share: a token store to train on, and the processes of the proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from esm2mega.prove.prover import Prover
from tests.distributed.runs import write_fasta
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    fasta = write_fasta(folder / "random.fasta")
    run_ranks(
        [
            "-m",
            "esm2mega",
            "prepare",
            "fasta",
            str(fasta),
            "--out",
            str(folder / "data"),
            "--valid-size",
            "12",
        ],
        1,
        folder,
    )
    return folder / "data" / "train"


@pytest.fixture(scope="session")
def prover() -> Iterator[Prover]:
    """Judges trials of up to four processes; a reference that one test has trained is there for the next.

    Take all verdicts before looking at any: a judgement that is left early ends its processes.
    """
    with Prover(processes=4, seed=1234) as prover:
        yield prover
