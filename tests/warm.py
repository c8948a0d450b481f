"""Python programs in processes that are forked from one that has imported PyTorch and Megatron-Core already.

A fresh interpreter imports for some five seconds of processor time before it does anything; a fork of one
that has imported begins at once. `start` takes what would stand behind ``python`` on a command line. The
process is a real one, in a session of its own, with its own variables, directory, output and signals. Three
things differ from a fresh interpreter, so some tests still start those: much is imported, the seed of hashes
is the same on all ranks, and no GPU is seen.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

IMPORTED = [
    "esm2mega.cli.app",
    "esm2mega.train.pretrain",
    "esm2mega.finetune.run",
    "h5py",
    "scipy.stats",
    "sklearn.metrics",
]
"""What all programs share; the trials of `esm2mega prove` are forked from the same process."""

_LIBRARIES = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
"""Variables that are read by what is imported."""


class Process:
    """A started program; the part of `subprocess.Popen` that the tests use."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def prepare() -> None:
    """Start the process that imports, unless it runs; it imports while the caller goes on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    with patch.dict(os.environ, _LIBRARIES):
        forkserver.ensure_running()


def start(
    arguments: Sequence[str],
    out: Path,
    err: Path,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Process:
    """Start ``python arguments``.

    Args:
        arguments: ``-m MODULE …``, ``-c CODE …`` or ``FILE …``.
        out, err: Files for its output.
        env: All its variables; those of the caller by default.
        cwd: Its directory; that of the caller by default.
    """
    prepare()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    environment, directory = dict(os.environ if env is None else env), str(cwd or Path.cwd())
    # Not daemonic: programs start processes of their own.
    process = context.Process(
        target=_become, args=(list(arguments), environment, directory, out, err, theirs), daemon=False
    )
    process.start()
    theirs.close()
    # Told when it leads a group, which can be ended from then on.
    with contextlib.suppress(EOFError):
        ours.recv()
    return Process(process)


def run(
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 180,
) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments`` to its end, as `subprocess.run` with ``capture_output`` and ``text``."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(arguments, out, err, env, cwd)
        try:
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(list(arguments), code, out.read_text(), err.read_text())


def _become(
    arguments: list[str],
    environment: dict[str, str],
    directory: str,
    out: Path,
    err: Path,
    ready: Connection,
) -> None:
    """Make this process what a fresh interpreter would be, and run the program in it."""
    os.setsid()
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    ready.send(None)
    ready.close()
    # What was imported is shared with the other processes as long as nothing writes into it.
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    try:
        _execute(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None
    finally:
        # A forked process leaves without what an interpreter does at its end.
        atexit._run_exitfuncs()


def _execute(first: str, *rest: str) -> None:
    sys.argv = [first, *rest]
    if first == "-m":
        sys.argv = list(rest)
        # Processes that the program spawns import its main module again, under the name that is set here.
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
