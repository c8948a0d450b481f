"""Killed with SIGKILL, a command leaves no process behind, whichever way it had started others."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from esm2mega.cli import group
from esm2mega.cli.app import main

PACKAGE = Path(__file__).parents[2] / "esm2mega"

# Starts a process in each way in which the package does, and says so.
STARTS = """
import multiprocessing, subprocess, time
from concurrent.futures import ProcessPoolExecutor
from esm2mega.processes import end_with_parent, follow_parent

def main():
    subprocess.Popen(["sleep", "600"], preexec_fn=end_with_parent)
    pools = []
    for method in ("spawn", "forkserver"):
        pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context(method), initializer=follow_parent
        )
        pool.submit(time.time).result()
        pool.submit(time.sleep, 600)
        pools.append(pool)
    print("started", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


def is_gone(process: psutil.Process) -> bool:
    # Nobody may be there to collect the exit code of an orphan.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a signal when a parent ends")
def test_a_killed_process_leaves_none_behind(tmp_path: Path) -> None:
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "started\n"
            descendants = psutil.Process(process.pid).children(recursive=True)
            # The server of forks and two trackers of resources, which end by themselves, are among them.
            assert len(descendants) >= 3
            process.kill()
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and not all(map(is_gone, descendants)):
                time.sleep(0.02)
            assert [left.cmdline() for left in descendants if not is_gone(left)] == []
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_ranks_of_torchrun_end_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It starts them itself; a process that was started otherwise may outlive a shell."""
    asked: list[int] = []
    monkeypatch.setattr(group, "end_with_parent", asked.append)
    command = ["inspect", str(tmp_path / "absent")]
    assert main(command) == 2 and asked == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert main(command) == 2 and asked == [signal.SIGTERM]


STARTERS = {"Popen", "Process", "ProcessPoolExecutor", "os.fork", "os.forkpty", "os.posix_spawn"}


def called(call: ast.Call) -> str:
    """The function's name, with the module in which only some functions start processes."""
    module = ast.unparse(call.func).rpartition(".")[0]
    name = ast.unparse(call.func).rpartition(".")[2]
    return f"{module}.{name}" if module in ("os", "psutil") else name


def test_every_module_that_starts_processes_ends_them_with_it() -> None:
    """`subprocess.run` and its kind wait for what they start, which has to be short."""
    starters, ending = set(), set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if {called(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)} & STARTERS:
            starters.add(path)
        if "preexec_fn=end_with_parent" in text or "follow_parent()" in text:
            ending.add(path)
    assert len(starters) >= 5
    assert starters <= ending, starters - ending
