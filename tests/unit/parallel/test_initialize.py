"""Process groups come up from nothing, know their place, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from esm2mega.config.schema import ParallelConfig
from esm2mega.errors import MachineError, UserError
from esm2mega.parallel import initialize
from esm2mega.parallel.initialize import Ranks, process_groups
from tests.ranks import run_ranks

PLACES = """
import dataclasses, json, sys
from esm2mega.config.schema import ParallelConfig
from esm2mega.parallel.initialize import process_groups
with process_groups(ParallelConfig(tensor_model_parallel_size=2), seed=1) as ranks:
    print(json.dumps([ranks.rank, ranks.tp_rank, ranks.tp_size, ranks.pp_size, ranks.dp_size, ranks.is_main]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_one_process_needs_no_launcher() -> None:
    with process_groups(ParallelConfig(), seed=1) as ranks:
        assert ranks == Ranks(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, torch.device("cpu"))
        assert ranks.is_main
        assert dist.get_backend() == "gloo"


@pytest.mark.parametrize(
    ("rank", "local_rank", "reports"),
    # Two hosts of two processes, of which the first, or its rank 0, does not answer.
    [("1", "1", True), ("2", "0", True), ("3", "1", False)],
)
def test_one_rank_of_a_host_reports_that_rank_0_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, rank: str, local_rank: str, reports: bool
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Timed out waiting 3000ms for recv operation to complete")

    monkeypatch.setenv("LOCAL_RANK", local_rank)
    store = dist.HashStore()
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *arguments, **options: None)
    monkeypatch.setattr(initialize, "store_of_groups", lambda timeout: (store, int(rank), 4))
    monkeypatch.setattr(initialize, "absent_ranks", lambda *arguments: [0])
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", fail)
    with (
        pytest.raises(MachineError, match="no answer from rank 0") as caught,
        process_groups(ParallelConfig(), 1),
    ):
        pass
    assert caught.value.claimed_report is reports


def test_more_processes_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(UserError, match="LOCAL_RANK=2, but this machine shows 2 CUDA devices"),
        process_groups(ParallelConfig(), seed=1),
    ):
        pass


def test_groups_are_gone_afterwards_and_can_come_again() -> None:
    for _ in range(2):
        with process_groups(ParallelConfig(), seed=1):
            assert parallel_state.model_parallel_is_initialized()
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()


def test_an_error_passes_through_with_its_claim() -> None:
    with pytest.raises(ValueError, match="mine") as error, process_groups(ParallelConfig(), seed=1):
        raise ValueError("mine")
    assert error.value.claimed_report is True  # type: ignore[attr-defined]
    assert not dist.is_initialized()


def test_seed_decides_the_generators() -> None:
    drawn = []
    for seed in (1, 1, 2):
        with process_groups(ParallelConfig(), seed=seed):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_two_ranks_know_their_places(tmp_path: Path) -> None:
    results = run_ranks(["-c", PLACES], 2, tmp_path)
    last_lines = [result.stdout.strip().splitlines()[-1] for result in results]
    assert last_lines == ["[0, 0, 2, 1, 1, true]", "[1, 1, 2, 1, 1, false]"]
