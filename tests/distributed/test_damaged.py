"""Two ranks share the verification of a checkpoint, and go on from an older one together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esm2mega.checkpoint import layout
from tests.checkpoints import full_tensors
from tests.distributed.runs import SETTINGS, train
from tests.ranks import RanksFailed, run_ranks
from tests.unit.checkpoint.test_digests import flip

BOTH_WRITE = {"parallel.tensor_model_parallel_size": 2}

pytestmark = pytest.mark.distributed


def test_both_ranks_go_on_from_the_newest_good_one(store: Path, tmp_path: Path) -> None:
    """Each rank wrote a file and reads another one; the damage is in that which only one of them reads."""
    run_dir = tmp_path / "run"
    steps = {**BOTH_WRITE, "train.max_steps": 3, "checkpoint.save_every": 1, "checkpoint.keep_last": 3}
    train(run_dir, store, steps, 2)
    last = layout.step_dir(run_dir, 3)
    expected = full_tensors(last)
    files = sorted(path.name for path in (last / "model").glob("*.distcp"))
    assert len(files) == 2, "one of each rank"
    flip(last / "model" / files[1], 3000)
    flip(layout.step_dir(run_dir, 2) / "model" / files[0], 3000)
    run_dir.joinpath("output").rename(tmp_path / "first")
    train(run_dir, store, steps, 2)
    said = (run_dir / "output" / "rank0.err").read_text()
    for step, name in ((3, files[1]), (2, files[0])):
        path = layout.step_dir(run_dir, step)
        assert f"{path / 'model' / name}: is damaged: its SHA-256 is not that of digests.json" in said
        assert f"{path.name} is now {path}.damaged\n" in said and Path(f"{path}.damaged").is_dir()
    assert "resumed from step_00000001 at step 1" in said
    actual = full_tensors(last)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_checkpoint_that_is_named_is_refused_once(store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, store, {**BOTH_WRITE, "train.max_steps": 1}, 2)
    checkpoint = layout.step_dir(run_dir, 1)
    name = max(path.name for path in (checkpoint / "model").glob("*.distcp"))
    flip(checkpoint / "model" / name, 3000)
    command = ["-m", "esm2mega", "evaluate", str(checkpoint), "--data", str(store), *SETTINGS[4:5]]
    with pytest.raises(RanksFailed) as failed:
        run_ranks(command, 2, tmp_path / "output")
    assert str(failed.value).count(f"error: {checkpoint / 'model' / name}: is damaged") == 1
