"""Of many failing processes exactly one reports."""

from __future__ import annotations

from pathlib import Path

from esm2mega.parallel.errors import claim_error_report, lost_peer
from tests.ranks import run_ranks, start_ranks, wait_ranks

# Each rank fails within the process groups, as a command does; the claim is asked for while they stand.
FAIL = """
from esm2mega.config.schema import ParallelConfig
from esm2mega.parallel.initialize import process_groups
try:
    with process_groups(ParallelConfig(tensor_model_parallel_size=2), seed=1):
        raise ValueError("on every rank")
except ValueError as error:
    print(error.claimed_report)
"""


def test_alone_it_reports() -> None:
    assert claim_error_report() is True
    assert claim_error_report() is True


def test_one_of_two_ranks_reports(tmp_path: Path) -> None:
    results = run_ranks(["-c", FAIL], 2, tmp_path)
    assert sorted(result.stdout.split()[-1] for result in results) == ["False", "True"]


# Rank 1 is gone in the middle of a collective, as after a kill: without a word.
DIE = """
import os
import torch
import torch.distributed as dist
from esm2mega.cli import app as cli
from esm2mega.config.schema import ParallelConfig
from esm2mega.parallel.initialize import process_groups

@cli.cli.command()
def die():
    with process_groups(ParallelConfig(), seed=1) as ranks:
        dist.all_reduce(torch.ones(1))
        if ranks.rank == 1:
            os._exit(9)
        while True:
            dist.all_reduce(torch.ones(100_000))

raise SystemExit(cli.main(["die"]))
"""


def test_a_lost_process_is_one_plain_line(tmp_path: Path) -> None:
    results = wait_ranks(start_ranks(["-c", DIE], 2, tmp_path), tmp_path, timeout=100)
    # The other one's code is that of the kill when the first is seen to have failed before it.
    assert results[0].returncode == 1 and results[1].returncode in (9, -9)
    lines = [line for line in results[0].stderr.splitlines() if line.startswith("esm2mega: ")]
    assert len(lines) == 1
    assert lines[0].startswith("esm2mega: [rank 0] error: lost the connection to another process (")
    assert "Traceback" not in results[0].stderr


def test_other_errors_are_not_taken_for_a_lost_process() -> None:
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_peer(ValueError("Connection reset by peer")) is None
