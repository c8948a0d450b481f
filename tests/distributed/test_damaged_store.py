"""A training on a damaged store ends in one line, on one process and on two, and saves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from esm2mega.data.store.token_store import StoreWriter
from esm2mega.data.store.verification import SMALL_BYTES
from tests.distributed.runs import SETTINGS
from tests.ranks import start_ranks, wait_ranks
from tests.unit.data.damage import flip

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with clusters, whose tokens are a large file."""
    rng = np.random.default_rng(2)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    path = tmp_path_factory.mktemp("clustered") / "store"
    with StoreWriter(path) as writer:
        residues = rng.choice(letters, size=(120, SMALL_BYTES // 100))
        writer.append([f"p{row}" for row in range(120)], [row.tobytes() for row in residues])
        writer.append_clusters([f"c{row}" for row in range(40)], np.full(40, 3), np.arange(120))
    assert (path / "tokens.bin").stat().st_size > SMALL_BYTES
    return path


@pytest.mark.some(4)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "name",
    ["tokens.bin", "clusters.members.npy", "tokens.idx", "ids.bin", "ids.offsets.npy", "manifest.json"],
)
def test_a_flipped_bit_ends_a_training(clustered: Path, tmp_path: Path, name: str, world_size: int) -> None:
    """The lowest bit of the last residue, which is never read here, or of a number in the middle."""
    shutil.copytree(clustered, tmp_path / "store")
    size = (clustered / name).stat().st_size
    flip(tmp_path / "store" / name, 8 * (size - 1 if name == "tokens.bin" else size // 16 * 8))
    given = [f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'store'}", "checkpoint.save_every=1"]
    arguments = ["-m", "esm2mega", "pretrain", *SETTINGS, *given]
    results = wait_ranks(start_ranks(arguments, world_size, tmp_path / "out"), tmp_path / "out", 120)
    assert [result.returncode for result in results] == [2] * world_size
    said = "".join(result.stderr for result in results)
    errors = [line for line in said.splitlines() if "error" in line]
    assert len(errors) == 1 and "Traceback" not in said, said
    assert (
        f"{tmp_path / 'store' / name}: " in errors[0] and "the token store is damaged; make it" in errors[0]
    )
    assert not list((tmp_path / "run").glob("checkpoints/*"))
