"""Of many failing processes exactly one reports."""

from __future__ import annotations

from pathlib import Path

from esm2mega.parallel.errors import claim_error_report
from tests.ranks import run_ranks

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
