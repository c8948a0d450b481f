"""An error on one rank ends the job at once and is the one that is reported, wherever other ranks wait."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.runs import SETTINGS, train
from tests.ranks import start_ranks, wait_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

# The command line, in which one rank raises an error in place of a function. Arguments: the rank, the object
# that has the function, and its name.
PLANTED = """
import os, pkgutil, sys
from esm2mega.cli.app import main
rank, owner, name = sys.argv[1:4]
def planted(*arguments, **keywords):
    raise AssertionError("planted in " + name)
if os.environ["RANK"] == rank:
    setattr(pkgutil.resolve_name(owner), name, planted)
sys.exit(main(sys.argv[4:]))
"""

MEGATRON = "megatron.core"
OPTIMIZER = f"{MEGATRON}.optimizer.distrib_optimizer:DistributedOptimizer"
SERIALIZATION = f"{MEGATRON}.dist_checkpointing.serialization"
WRITER = f"{MEGATRON}.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync"

Planted = tuple[str, str, str, tuple[str, ...]]
SHORT = ("train.max_steps=2", "checkpoint.save_every=1", "train.eval_every=2")
SHARDED = ("parallel.distributed_optimizer=true",)
SPLIT = ("parallel.tensor_model_parallel_size=2",)
BEHIND = (*SPLIT, "checkpoint.async_save=true")

SAVES = {
    "state gathered, rank 1": ("1", OPTIMIZER, "sharded_state_dict", SHARDED),
    "state gathered, rank 0": ("0", OPTIMIZER, "sharded_state_dict", SHARDED),
    "own part of the state": ("1", "esm2mega.checkpoint.store", "begin_states", ()),
    "plan": ("1", SERIALIZATION, "save_preprocess", ()),
    "beginning to write": ("1", "esm2mega.checkpoint.save_strategy:SaveQueue", "_get_async_caller", ()),
    "writing": ("1", WRITER, "write_preloaded_data", SPLIT),
    "writing behind": ("1", WRITER, "write_preloaded_data", BEHIND),
    "results": ("1", WRITER, "retrieve_write_results", ()),
    "results behind": ("0", WRITER, "retrieve_write_results", BEHIND),
    "index": ("0", SERIALIZATION, "save_config", ()),
}
ELSEWHERE = {
    "start of the model": ("1", "esm2mega.model.build", "initialize_parameters", ()),
    "first step": ("1", "esm2mega.train.step", "run_schedule", ()),
    "evaluation": ("1", "esm2mega.train.evaluate", "run_schedule", ()),
}
RESUMING = {
    "verification": ("1", "esm2mega.convert.start_point", "share_of", ()),
    "tensors": ("1", "esm2mega.checkpoint.store", "_put_weights", SHARDED),
    "optimizer": ("0", "esm2mega.checkpoint.store", "_load_optimizer", SHARDED),
}


# These stand for the others in `make test`.
SHORTEST = ("state gathered, rank 1", "state gathered, rank 0", "results", "evaluation", "verification")


def _each(group: dict[str, Planted]) -> pytest.MarkDecorator:
    """Parameters of a test: every error of a group, most of them in `make test-all` alone."""
    slow = {name: () if name in SHORTEST else pytest.mark.slow for name in group}
    values = [pytest.param(planted, id=name, marks=slow[name]) for name, planted in group.items()]
    return pytest.mark.parametrize("planted", values)


def _fails(planted: Planted, run_dir: Path, store: Path) -> str:
    """The line of a training in which the error is planted; it must say which error, and end all ranks.

    The default timeout is half an hour: a rank that waited for it would be ended by the test.
    """
    rank, owner, name, settings = planted
    output = run_dir.parent / f"{run_dir.name}_output"
    given = [
        f"run_dir={run_dir}",
        f"data.train={store}",
        f"data.valid={store.parent / 'valid'}",
        *SETTINGS,
        *SHORT,
        *settings,
    ]
    ranks = start_ranks(["-c", PLANTED, rank, owner, name, "pretrain", *given], 2, output)
    results = wait_ranks(ranks, output, timeout=400)
    assert [result.returncode for result in results] == [1, 1], [result.stderr[-2000:] for result in results]
    said = [line for result in results for line in result.stderr.splitlines() if "esm2mega: [rank" in line]
    said = [line for line in said if "error" in line]
    (line,) = (line for line in said if f"planted in {name}" in line)
    assert f"rank {rank}" in line, said
    # Rank 0 hosts the store at which the others ask who reports, where no agent of torchrun does; once it has
    # left, a lost connection may be reported besides.
    assert rank == "0" or said == [line], said
    return line


@pytest.mark.some(1)
@_each(SAVES)
def test_in_a_save(planted: Planted, store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = _fails(planted, run_dir, store)
    assert "step_00000001: not saved: " in line
    assert list((run_dir / "checkpoints").iterdir()) == []


@_each(ELSEWHERE)
def test_in_training(planted: Planted, store: Path, tmp_path: Path) -> None:
    _fails(planted, tmp_path / "run", store)


@pytest.fixture(scope="module")
def begun(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with a checkpoint of step 1."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    train(run_dir, store, {"train.max_steps": 1, "parallel.distributed_optimizer": True}, world_size=2)
    return run_dir


@_each(RESUMING)
def test_in_a_resume(planted: Planted, begun: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "run")
    _fails(planted, tmp_path / "run", store)
