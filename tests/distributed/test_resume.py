"""A killed run goes on as if nothing had happened: at the same layout bit by bit, at another to rounding."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.prove.command import row_named
from esm2mega.prove.compare import KINDS
from esm2mega.prove.prover import Prover
from esm2mega.prove.trials import GROUPS, Trial
from tests.checkpoints import full_tensors
from tests.distributed.runs import SETTINGS, Outcome, kill_after_step_5, outcome, records, train
from tests.prove.short import short_and_whole
from tests.ranks import end_ranks, start_ranks

pytestmark = pytest.mark.distributed

STEPS = {"train.max_steps": 10, "checkpoint.save_every": 5, "checkpoint.keep_last": 5, "train.eval_every": 5}


def settings(store: Path) -> dict[str, Any]:
    return {**STEPS, "data.valid": str(store.parent / "valid")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Outcome:
    return train(tmp_path_factory.mktemp("unbroken") / "run", store, settings(store))


def back_to_step_5(run_dir: Path, target: Path) -> Path:
    """A copy of a run as a crash after step 5 would have left it: later checkpoints gone, later log lines
    there.
    """
    shutil.copytree(run_dir, target)
    shutil.rmtree(target / "checkpoints" / "step_00000010")
    return target


def test_kill_and_resume_is_bit_identical(unbroken: Outcome, store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["-m", "esm2mega", "pretrain", f"run_dir={run_dir}", f"data.train={store}", *SETTINGS]
    arguments += [f"{key}={value}" for key, value in settings(store).items()]
    kill_after_step_5(arguments, run_dir, tmp_path / "killed", seconds=120)
    assert not (run_dir / "checkpoints" / "step_00000010").exists(), (
        "the run was too fast to be killed between"
    )
    resumed = train(run_dir, store, settings(store))
    assert records(run_dir) == records(unbroken.run_dir)
    assert resumed.losses == unbroken.losses
    expected = full_tensors(unbroken.run_dir / "checkpoints" / "step_00000010")
    actual = full_tensors(run_dir / "checkpoints" / "step_00000010")
    assert actual.keys() == expected.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in expected)
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


# The optimizer is divided, and no more; each axis is left or entered.
PAIRS = ["DP2 DO -> TP2 PP2", "TP2 SP -> DP2 DO"]


@pytest.mark.timeout(900)
@short_and_whole(map(row_named, PAIRS), GROUPS["resume"])
def test_resume_at_another_layout(
    prover: Prover, runs: Callable[[], AbstractContextManager[None]], trials: list[Trial]
) -> None:
    """Data, schedule and early stopping go on, and losses, gradients, weights and optimizer equal those of an
    unbroken run of one process.
    """
    with runs():
        verdicts = list(prover.judge(trials))
    assert len(verdicts) == len(trials)
    for verdict in verdicts:
        assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
        assert {difference.kind for difference in verdict.worst} == set(KINDS), "something was not compared"
        assert verdict.passed, f"{verdict.trial}: {verdict.largest.value:.1e} in {verdict.largest}"


def test_resume_takes_the_optimizer_settings_of_this_start(
    unbroken: Outcome, store: Path, tmp_path: Path
) -> None:
    run_dir = back_to_step_5(unbroken.run_dir, tmp_path / "run")
    train(run_dir, store, {**settings(store), "optim.lr": 1e-4, "optim.betas": [0.5, 0.6]})
    rates = {record["step"]: record["lr"] for record in records(run_dir) if record["kind"] == "train"}
    assert rates == {**dict.fromkeys(range(1, 6), 2e-3), **dict.fromkeys(range(6, 11), 1e-4)}
    only_rate = back_to_step_5(unbroken.run_dir, tmp_path / "only_rate")
    train(only_rate, store, {**settings(store), "optim.lr": 1e-4})
    assert outcome(run_dir).losses[6:] != outcome(only_rate).losses[6:], "betas were not taken"


def _signal_one_rank(processes: list[subprocess.Popen[str]]) -> None:
    processes[1].send_signal(signal.SIGUSR1)


def _signal_all_groups(processes: list[subprocess.Popen[str]]) -> None:
    """As torchrun does: whatever a rank has started gets the signal too."""
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("send", "in_background"), [(_signal_one_rank, "false"), (_signal_all_groups, "true")]
)
def test_stop_signal_saves_and_exits_75(
    store: Path, tmp_path: Path, send: Callable[[list[subprocess.Popen[str]]], None], in_background: str
) -> None:
    """Between checkpoints that are saved at once, and while one is written in the background."""
    run_dir = tmp_path / "run"
    arguments = ["-m", "esm2mega", "pretrain", f"run_dir={run_dir}", f"data.train={store}", *SETTINGS]
    arguments += ["train.max_steps=100000", "checkpoint.save_every=2", "checkpoint.keep_last=1"]
    arguments += [f"checkpoint.async_save={in_background}"]
    processes = start_ranks(arguments, 2, tmp_path / "output")
    try:
        deadline = time.monotonic() + 120
        complete = run_dir / "checkpoints" / "step_00000002" / "COMPLETE"
        while time.monotonic() < deadline and not complete.exists():
            time.sleep(0.05)
        send(processes)
        codes = [process.wait(timeout=60) for process in processes]
    finally:
        end_ranks(processes)
    assert codes == [75, 75], (tmp_path / "output" / "rank0.err").read_text()
    (saved,) = (run_dir / "checkpoints").iterdir()
    last = records(run_dir)[-1]["step"]
    assert saved.name == f"step_{last:08d}"
