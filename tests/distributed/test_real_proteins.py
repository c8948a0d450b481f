"""Training on real proteins learns more than how frequent each residue is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.unit.data.conftest import REAL_FASTA

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.skipif(not REAL_FASTA.is_file(), reason=f"the UniRef90 sample is not at {REAL_FASTA}")
@pytest.mark.timeout(1800)
def test_uniref90_gets_below_residue_frequencies(tmp_path: Path) -> None:
    """The README's commands, with half of the steps."""
    store, run_dir = tmp_path / "store", tmp_path / "run"
    prepare = ["prepare", "fasta", str(REAL_FASTA), "--out", str(store), "--val-size", "400"]
    run_ranks(["-m", "esm2mega", *prepare], 1, tmp_path / "prepare")
    data = [f"data.train={store / 'train'}", f"data.valid={store / 'valid'}", "train.max_steps=200"]
    pretrain = ["pretrain", "--config", "pretrain_esm2_tiny", f"run_dir={run_dir}", *data]
    run_ranks(["-m", "esm2mega", *pretrain], 2, tmp_path / "output", timeout=1700)
    last = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "eval"
    assert last["valid_loss"] < last["unigram_loss"]
