"""A save in the background holds the state of its step; a killed process leaves the checkpoint before it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from esm2mega.checkpoint.tensors import TensorReader
from tests.distributed.runs import SETTINGS, records
from tests.ranks import end_ranks, free_port, run_ranks, start_ranks
from tests.unit.test_processes import is_gone

pytestmark = pytest.mark.distributed

TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SHARDED, BF16 = "parallel.distributed_optimizer=true", "model.precision=bf16"
LAYOUTS = {
    "DP2": [BF16],
    "DP2-sharded": [BF16, SHARDED],
    "TP2": ["model.num_attention_heads=4", TP2],
    "TP2-sharded": ["model.num_attention_heads=4", BF16, TP2, SHARDED],
    "PP2": [BF16, PP2],
    "PP2-sharded": [PP2, SHARDED],
}


def test_background_saves_the_state_of_its_step(tmp_path: Path) -> None:
    """Every tensor equals that of a save at once, though a step is made before the background writes.

    The index is a pickle, which may note equal objects in two ways: its content is compared.
    """
    layouts = [f"{free_port()}/{name}/{','.join(settings)}" for name, settings in LAYOUTS.items()]
    arguments = ["-m", "tests.distributed.async_checks", str(tmp_path), *layouts]
    run_ranks(arguments, 2, tmp_path / "output")
    for name in LAYOUTS:
        paths = {how: tmp_path / name / how / "step_00000002" for how in ("sync", "async", "later")}
        found = {how: json.loads((path / "digests.json").read_text())["files"] for how, path in paths.items()}
        for files in found.values():
            del files["model/.metadata"]
        assert TensorReader(paths["async"]).index == TensorReader(paths["sync"]).index
        assert found["async"] == found["sync"], name
        tensors = [file for file in found["sync"] if file.endswith(".distcp")]
        assert tensors and not any(found["later"][file] == found["sync"][file] for file in tensors), name


# The command line, in which the save of step 4 begins to write its file and never ends.
STUCK = """
import sys, time
from esm2mega.checkpoint import saver
work = saver._work
def stuck(save, write, rank, *arguments):
    if save.directory.name == "step_00000004" and rank == int(sys.argv[1]):
        (save.partial / "model" / f"__{rank}_0.distcp").write_bytes(b"half")
        time.sleep(600)
    work(save, write, rank, *arguments)
saver._work = stuck
from esm2mega.cli.app import main
sys.exit(main(sys.argv[2:]))
"""


def test_kill_during_a_background_save_leaves_the_last_good_checkpoint(store: Path, tmp_path: Path) -> None:
    """Training goes on beside it; the next start resumes from the one before, and removes the remains."""
    run_dir = tmp_path / "run"
    arguments = ["pretrain", f"run_dir={run_dir}", f"data.train={store}", *SETTINGS, "train.max_steps=1000"]
    arguments += ["checkpoint.async_save=true", "checkpoint.save_every=2", "checkpoint.keep_last=1"]
    processes = start_ranks(["-c", STUCK, "1", *arguments], 2, tmp_path / "output")
    log = run_dir / "log.jsonl"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.exists() and '"step": 5' in log.read_text()):
            time.sleep(0.05)
        names = {path.name for path in (run_dir / "checkpoints").iterdir()}
        os.killpg(processes[1].pid, signal.SIGKILL)
        assert names == {"step_00000002", "step_00000004.partial"}
        assert processes[0].wait(timeout=60) == 1, "it lost the other rank, and ends"
    finally:
        end_ranks(processes)
    other_steps = ["train.max_steps=3", "checkpoint.save_every=0"]
    (result, _) = run_ranks(["-m", "esm2mega", *arguments, *other_steps], 2, tmp_path / "again")
    assert "resumed from step_00000002" in result.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000003"]
    assert records(run_dir)[-1]["step"] == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a signal when a parent ends")
def test_a_killed_launcher_ends_the_training_and_its_workers(store: Path, tmp_path: Path) -> None:
    """The rank gets SIGTERM, saves and ends; torchrun starts ranks in sessions of their own."""
    run_dir = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    arguments = ["-m", "esm2mega", "pretrain", f"run_dir={run_dir}", f"data.train={store}", *SETTINGS]
    arguments += ["train.max_steps=100000", "checkpoint.save_every=3", "checkpoint.async_save=true"]
    (process,) = start_ranks([*launcher, *arguments, "data.workers=1"], 1, tmp_path / "output")
    descendants: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        complete = run_dir / "checkpoints" / "step_00000003" / "COMPLETE"
        while time.monotonic() < deadline and not complete.exists():
            time.sleep(0.05)
        descendants = psutil.Process(process.pid).children(recursive=True)
        assert len(descendants) >= 2, (tmp_path / "output" / "rank0.err").read_text()
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not all(map(is_gone, descendants)):
            time.sleep(0.05)
        assert [left.cmdline() for left in descendants if not is_gone(left)] == []
    finally:
        end_ranks([process])
        for left in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names[-1] == f"step_{records(run_dir)[-1]['step']:08d}"
