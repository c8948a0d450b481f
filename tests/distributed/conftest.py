"""A token store that the training runs of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

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
