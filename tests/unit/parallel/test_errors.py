"""Of many failing processes exactly one reports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from esm2mega.parallel.errors import claim_error_report, first_error, lost_peer, on_one_rank
from tests.ranks import RankResult, run_ranks, start_ranks, wait_ranks

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


def test_only_a_wait_that_was_too_short_is_cured_by_a_longer_one() -> None:
    waited = lost_peer(RuntimeError("Timed out waiting 1800000ms for recv operation to complete"))
    assert str(waited).endswith("on a large input, raise parallel.timeout_minutes")
    # What the kernel says of a host that ended, and of one that no longer answers.
    for said in ("Connection reset by peer", "Connection timed out", "No route to host"):
        assert "timeout_minutes" not in str(lost_peer(RuntimeError(f"read error: {said}")))
        assert said in str(lost_peer(RuntimeError(f"read error: {said}")))


def test_other_errors_are_not_taken_for_a_lost_process() -> None:
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_peer(ValueError("Connection reset by peer")) is None


# What each rank would say for itself differs; before, within, between and after two worlds of process groups.
TELL = """
import os, time
from esm2mega.config.schema import ParallelConfig
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import process_groups
rank = int(os.environ["RANK"])
time.sleep(rank)
said = [on_one_rank(lambda: (number, rank)) for number in range(3)]
for _ in range(2):
    with process_groups(ParallelConfig(), seed=1):
        said.append(on_one_rank(lambda: os.getpid() if rank == 0 else None))
    said.append(on_one_rank(lambda: rank))
print(said)
"""


def test_what_rank_0_finds_reaches_the_others_at_any_time(tmp_path: Path) -> None:
    results = run_ranks(["-c", TELL], 2, tmp_path)
    assert results[0].stdout == results[1].stdout
    said = ast.literal_eval(results[0].stdout)
    assert said[:3] == [(0, 0), (1, 0), (2, 0)] and said[4::2] == [0, 0]
    assert said[3] == said[5] > 1


SHARE = """
import os
from esm2mega.config.schema import ParallelConfig
from esm2mega.errors import DamagedError, MachineError
from esm2mega.parallel.errors import first_error
from esm2mega.parallel.initialize import process_groups
def share(rank, num_ranks):
    assert (rank, num_ranks) == (int(os.environ["RANK"]), 2)
    if rank == bad:
        raise DamagedError(f"file{rank}", "is damaged") if rank else MachineError("bad disk")
def found():
    global bad
    for bad in (-1, 0, 1):
        error = first_error(share)
        print(type(error).__name__, error)
found()
with process_groups(ParallelConfig(), seed=1):
    found()
found()
"""


def test_every_rank_learns_the_error_of_another_ones_share(tmp_path: Path) -> None:
    """Before, within and after process groups."""
    results = run_ranks(["-c", SHARE], 2, tmp_path)
    said = "NoneType None\nMachineError bad disk\nDamagedError file1: is damaged\n" * 3
    assert [result.stdout for result in results] == [said, said]


def test_alone_nobody_is_asked() -> None:
    with pytest.raises(ZeroDivisionError):
        on_one_rank(lambda: 1 / 0)
    assert on_one_rank(lambda: 5) == 5
    shares: list[tuple[int, int]] = []
    assert first_error(lambda *share: shares.append(share)) is None and shares == [(0, 1)]


# `finds` runs on rank 0 before there are process groups; the store is that of a launcher if it has a port.
COMMAND = """
import os, sys, time
from datetime import timedelta
from esm2mega.cli import app as cli
from esm2mega.errors import MachineError, UserError
from esm2mega.parallel import rendezvous
from esm2mega.parallel.errors import on_one_rank
rank, (kind, port, seconds) = int(os.environ["RANK"]), sys.argv[1:]
if port != "0":
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}

def finds():
    if kind == "dies":
        os._exit(9)
    raise {"user": UserError("bad"), "machine": MachineError("bad"), "defect": ValueError("bad")}[kind]

def late(*arguments):
    number = next_number(*arguments)
    time.sleep(rank)
    return number

next_number, rendezvous.next_number = rendezvous.next_number, late

@cli.cli.command()
def start():
    if (kind, rank) in (("absent", 1), ("no host", 0)):
        os._exit(9)
    on_one_rank(finds if kind != "absent" else int, timedelta(seconds=int(seconds)))

raise SystemExit(cli.main(["start"]))
"""


@pytest.mark.parametrize("has_launcher", [False, True])
@pytest.mark.parametrize(("kind", "code"), [("user", 2), ("machine", 1)])
def test_an_error_of_rank_0_ends_all_ranks_alike(
    tmp_path: Path, kind: str, code: int, has_launcher: bool
) -> None:
    """Rank 1 asks a second later, when rank 0 has long found its error and would be gone."""
    results = command_of_two(kind, has_launcher, tmp_path)
    assert [result.returncode for result in results] == [code, code]
    assert [result.stderr for result in results] == ["esm2mega: [rank 0] error: bad\n", ""]


@pytest.mark.parametrize("has_launcher", [False, True])
def test_a_defect_on_rank_0_does_not_leave_the_others_waiting(tmp_path: Path, has_launcher: bool) -> None:
    results = command_of_two("defect", has_launcher, tmp_path)
    assert [result.returncode for result in results] == [1, 1]
    assert results[0].stderr.startswith("esm2mega: [rank 0] internal error: ValueError: bad")
    assert results[1].stderr == ""


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("kind", "has_launcher", "line"),
    [
        ("dies", False, "[rank 1] error: lost the connection to another process ("),
        ("dies", True, "[rank 1] error: no answer from rank 0 in 0.0333333 minutes"),
        ("absent", True, "[rank 0] error: no answer from rank 1 in 0.0333333 minutes"),
        ("no host", False, "[rank 1] error: no answer from another process in 0.0333333 minutes"),
    ],
)
def test_nobody_waits_for_ever_for_a_process_that_is_gone(
    tmp_path: Path, kind: str, has_launcher: bool, line: str
) -> None:
    results = command_of_two(kind, has_launcher, tmp_path)
    survivor, other = (results[0], results[1]) if kind == "absent" else (results[1], results[0])
    assert survivor.returncode == 1 and other.returncode in (9, -9)
    lines = [text for text in survivor.stderr.splitlines() if text.startswith("esm2mega: ")]
    assert len(lines) == 1 and lines[0].startswith(f"esm2mega: {line}")
    assert "Traceback" not in survivor.stderr


def command_of_two(kind: str, has_launcher: bool, folder: Path) -> list[RankResult]:
    """Run `COMMAND` on two ranks; where a wait is expected to run out, it does after 2 s."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if has_launcher else None
    seconds = 2 if kind == "no host" or has_launcher and kind in ("dies", "absent") else 100
    arguments = [kind, str(store.port if store else 0), str(seconds)]
    return wait_ranks(start_ranks(["-c", COMMAND, *arguments], 2, folder), folder, timeout=100)
