"""Faults in the middle of a job: numbers that are none, ranks that stall or die, signals before training."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.broken_protein import write_proteins
from tests.checkpoints import full_tensors
from tests.distributed.runs import SHAPE
from tests.ranks import REPOSITORY, end_ranks, free_port, run_ranks, start_ranks

pytestmark = pytest.mark.distributed

SETTINGS = (
    *SHAPE,
    "model.precision=fp64",
    "data.max_seq_length=64",
    "data.pack_window=40",
    "train.micro_batch_tokens=128",
    "train.global_batch_tokens=512",
    "train.max_steps=6",
    "train.log_every=1",
    "train.eval_every=0",
    "checkpoint.save_every=2",
    "checkpoint.keep_last=9",
    "optim.lr=2e-3",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
)

LAYOUTS = {
    "1": (1, ()),
    "TP2": (2, ("parallel.tensor_model_parallel_size=2",)),
    "PP2": (2, ("parallel.pipeline_model_parallel_size=2",)),
    "DP2": (2, ()),
    "CP2": (2, ("parallel.context_parallel_size=2",)),
}


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 60 random proteins, of which p30 alone has pyrrolysines."""
    folder = tmp_path_factory.mktemp("proteins")
    write_proteins(folder / "all.fasta")
    arguments = ["prepare", "fasta", str(folder / "all.fasta"), "--out", str(folder / "data")]
    run_ranks(["-m", "esm2mega", *arguments], 1, folder)
    return folder / "data" / "train"


def train(run_dir: Path, data: Path, mode: str, layout: str, *settings: str) -> None:
    size, of_layout = LAYOUTS[layout]
    given = [f"run_dir={run_dir}", f"data.train={data}", *SETTINGS, *of_layout, *settings]
    run_ranks(["-m", "tests.broken_protein", mode, "pretrain", *given], size, run_dir / "output")


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "incidents.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def weights(run_dir: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return full_tensors(run_dir / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize(
    "layouts", [("1", "DP2"), pytest.param(("1", "TP2", "CP2", "PP2"), marks=pytest.mark.slow)]
)
def test_every_layout_leaves_out_the_same_pack(
    tmp_path: Path, proteins: Path, layouts: tuple[str, ...]
) -> None:
    """One process gives the bits of a run that never had the pack, and the other layouts follow it."""
    train(tmp_path / "never", proteins, "absent", "1")
    expected = weights(tmp_path / "never")
    for layout in layouts:
        train(tmp_path / layout, proteins, "infinite", layout, "train.on_nonfinite=rollback")
        assert incidents(tmp_path / layout) == incidents(tmp_path / "1"), layout
        found = weights(tmp_path / layout)
        assert found.keys() == expected.keys()
        # fp64: sums in another order differ by rounding, a pack more or less by 1e-4 and more.
        bound = 0.0 if layout == "1" else 1e-10
        assert max((found[n].double() - expected[n].double()).abs().max() for n in found) <= bound, layout
    (record,) = incidents(tmp_path / "1")
    (pack,) = record["packs"]
    assert "p30" in pack["proteins"] and record["loss"] == "nan" and record["action"] == "rollback"
    assert (pack["pack"] // 4 + 1, record["policy"]) == (record["step"], "rollback")


def test_a_step_is_skipped_by_all_ranks(tmp_path: Path, proteins: Path) -> None:
    """A loss that one data-parallel rank alone does not have; the weights before and behind are the same."""
    train(tmp_path / "run", proteins, "gradient", "DP2", "train.on_nonfinite=skip", "checkpoint.save_every=1")
    (record,) = incidents(tmp_path / "run")
    step = record["step"]
    assert (record["kind"], record["action"], len(record["packs"])) == ("gradient norm", "skip", 4)
    before, behind = weights(tmp_path / "run", step - 1), weights(tmp_path / "run", step)
    assert all(torch.equal(before[name], behind[name]) for name in before)
    after = weights(tmp_path / "run", step + 1)
    assert not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stalled", [0, 1])
def test_a_stalled_rank_is_named(tmp_path: Path, proteins: Path, stalled: int) -> None:
    """Rank 0 also hosts the store through which the others would ask for it."""
    arguments = ["-m", "tests.faulty_rank", "SIGSTOP", str(stalled), "3", "pretrain"]
    arguments += [f"run_dir={tmp_path / 'run'}", f"data.train={proteins}", *SETTINGS]
    ranks = start_ranks([*arguments, "parallel.timeout_minutes=0.05"], 2, tmp_path)
    try:
        assert ranks[1 - stalled].wait(60) == 1
    finally:
        end_ranks(ranks)
    output = (tmp_path / f"rank{1 - stalled}.err").read_text()
    (line,) = (line for line in output.splitlines() if line.startswith("esm2mega: "))
    assert f"no answer from rank {stalled} in 0.05 minutes" in line


def test_torchrun_restarts_a_job_that_lost_a_rank(tmp_path: Path, proteins: Path) -> None:
    given = [f"data.train={proteins}", *SETTINGS]
    arguments = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--no-python"]
    arguments += [str(tmp_path / "python"), "-m", "tests.faulty_rank", "SIGKILL", "1", "4", "pretrain"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with warm.interpreter(tmp_path / "python"):
        torchrun = warm.run(
            ["-m", "torch.distributed.run", *arguments, f"run_dir={tmp_path / 'killed'}", *given], environment
        )
    assert torchrun.returncode == 0, torchrun.stderr[-3000:]
    assert "resumed from step_00000002 at step 2" in torchrun.stderr
    unbroken = ["-m", "esm2mega", "pretrain", f"run_dir={tmp_path / 'whole'}", *given]
    run_ranks(unbroken, 2, tmp_path / "output")
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_at_the_rendezvous(tmp_path: Path, proteins: Path, name: str) -> None:
    """The process waits for another one, outside of Python, and would wait for half an hour."""
    port = free_port()
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **world, "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY)}
    arguments = ["-m", "esm2mega", "pretrain", f"run_dir={tmp_path / 'run'}", f"data.train={proteins}"]
    process = warm.start([*arguments, *SETTINGS], tmp_path / "out", tmp_path / "err", environment)
    try:
        _wait_for(port)
        process.send_signal(signal.Signals[name])
        assert process.wait(30) == 75
    finally:
        end_ranks([process])
    line = f"esm2mega: [rank 0] stopped by {name}; start the same command again to continue"
    assert (tmp_path / "err").read_text().splitlines() == [line]


def _wait_for(port: int) -> None:
    """Wait until somebody listens there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("no rendezvous was opened")
