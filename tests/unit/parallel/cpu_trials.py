"""Tries each check of `cpu_checks` with its row of `esm2mega.parallel.cpu.ROWS` and without it.

As a script it writes one JSON object to the path it is given: row name -> `Finding`. Adaptation cannot be
undone within a process, so every trial is a forked world of one or two; the parent adapts nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import TCPStore

from esm2mega.parallel import cpu
from esm2mega.parallel.initialize import process_groups
from tests.unit.parallel.cpu_checks import CHECKS


@dataclass(frozen=True)
class Finding:
    """Whether the row found its place in an unadapted Megatron-Core; how its check ended, None is success."""

    found: bool
    with_row: str | None
    without_row: str | None


def try_all() -> dict[str, Finding]:
    modules = {row.module: importlib.import_module(row.module) for row in cpu.ROWS}
    found = {row.name: row.find(modules[row.module]) for row in cpu.ROWS}
    with_row: dict[str, str | None] = {}
    for size in (1, 2):
        with_row |= _trial([name for name, check in CHECKS.items() if check.world_size == size], cpu.ROWS)
    return {
        row.name: Finding(
            found=found[row.name],
            with_row=with_row[row.name],
            without_row=_trial([row.name], [other for other in cpu.ROWS if other is not row])[row.name],
        )
        for row in cpu.ROWS
    }


def _trial(names: Sequence[str], rows: Sequence[cpu.Row]) -> dict[str, str | None]:
    """Run checks of worlds of one size, one after the other, in forked processes with only `rows` adapted.

    Returns:
        The first failure of each, None where there is none.
    """
    world_size = CHECKS[names[0]].world_size
    # As torchrun's agent does, the parent hosts the store, on a port that nobody else can take meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / str(rank) for rank in range(world_size)]
        children = []
        for rank, report in enumerate(reports):
            child = os.fork()
            if child == 0:
                _be_rank(names, rows, rank, store.port, report)
            children.append(child)
        _wait(children, reports)
        failures = [_read(report) for report in reports]
    # What a rank came to before its failure is an empty text.
    return {
        name: next((text for of_rank in failures if (text := of_rank.get(name, "did not end"))), None)
        for name in names
    }


def _be_rank(names: Sequence[str], rows: Sequence[cpu.Row], rank: int, port: int, report: Path) -> None:
    cpu.ROWS = tuple(rows)
    failures = {}
    for name in names:
        check = CHECKS[name]
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(check.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        failures[name] = ""
        try:
            with process_groups(check.parallel, seed=1) as ranks:
                check.function(ranks)
        except BaseException:
            failures[name] = traceback.format_exc()
            break
    report.with_suffix(".partial").write_text(json.dumps(failures))
    report.with_suffix(".partial").rename(report)
    os._exit(0)


def _wait(children: list[int], reports: list[Path]) -> None:
    """Wait for all reports; after a failure the other rank may hang in a collective and is ended."""
    deadline = time.monotonic() + 60
    while not all(report.exists() for report in reports) and time.monotonic() < deadline:
        if any(any(_read(report).values()) for report in reports):
            deadline = min(deadline, time.monotonic() + 0.5)
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _read(report: Path) -> dict[str, str]:
    failures: dict[str, str] = json.loads(report.read_text()) if report.exists() else {}
    return failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps({name: asdict(finding) for name, finding in try_all().items()}))
