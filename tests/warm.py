"""Python programs in processes that are forked from one that has imported PyTorch and Megatron-Core already.

A fresh interpreter imports for some five seconds of processor time before it does anything; a fork of one
that has imported begins at once. `start` takes what would stand behind ``python`` on a command line. The
process is a real one, in a session of its own, with its own variables, directory, output and signals. Three
things differ from a fresh interpreter, so some tests still start those: much is imported, the seed of hashes
is the same on all ranks, and no GPU is seen.

Scripts start such processes too, through the file that `interpreter` writes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from esm2mega.prove.workers import PRELOADED

IMPORTED = [
    "esm2mega.cli.app",
    *PRELOADED,
    "h5py",
    "esm2mega.convert.convert",
    "esm2mega.data.store.prepare",
    "esm2mega.finetune.predict",
    "esm2mega.infer.embed",
    "esm2mega.train.start",
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
        # It may end behind the question.
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def prepare(also: Sequence[str] = ()) -> None:
    """Start the process that imports, unless it runs; it imports while the caller goes on.

    Args:
        also: Further modules to import, for programs that are started by the thousand.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*IMPORTED, *also])
    with patch.dict(os.environ, _LIBRARIES):
        forkserver.ensure_running()


class _Descriptors:
    """File descriptors of a process that starts another one, which gets copies of them."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __getstate__(self) -> list[Any]:
        return [reduction.DupFd(number) for number in self.numbers]

    def __setstate__(self, copies: list[Any]) -> None:
        self.numbers = tuple(copy.detach() for copy in copies)


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
    with open(os.devnull) as nothing, out.open("w") as stdout, err.open("w") as stderr:
        streams = _Descriptors(nothing.fileno(), stdout.fileno(), stderr.fileno())
        return _start(arguments, streams, dict(os.environ if env is None else env), str(cwd or Path.cwd()))


def _start(
    arguments: Sequence[str], streams: _Descriptors, environment: dict[str, str], directory: str
) -> Process:
    prepare()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    # Not daemonic: programs start processes of their own.
    process = context.Process(
        target=_become, args=(list(arguments), environment, directory, streams, theirs), daemon=False
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


_CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
words = sys.argv[1:]
while words and words[0] in ("-u", "-W"):
    del words[: 1 + (words[0] == "-W")]
if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [b"%12d" % len(request)], [0, 1, 2])
server.sendall(request)
answers = server.makefile()
started = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(started, number))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def interpreter(path: Path) -> Iterator[None]:
    """Write an executable that stands in for Python in scripts; its programs start warm inside the context.

    It waits for the program, passes signals on to it and ends as it does. A program ends with it.
    """
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/python"
        listener.bind(address)
        listener.listen()
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        path.write_text(_CLIENT.format(python=sys.executable, address=address))
        path.chmod(0o755)
        yield
        # Wakes the thread, which a closed socket would not.
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    """Start the program that one stand-in asks for, and tell its process number and its exit code."""
    with connection:
        size, streams, _, _ = socket.recv_fds(connection, 12, 3)
        with connection.makefile("rb") as request:
            words, environment, directory = json.loads(request.read(int(size)))
        process = _start(words, _Descriptors(*streams), environment, directory)
        for number in streams:
            os.close(number)
        # First of all: the stand-in may be gone already, and the program must end with it.
        threading.Thread(target=_end_with, args=(connection.dup(), process), daemon=True).start()
        with contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % process.pid)
            connection.sendall(b"%d\n" % process.wait())


def _end_with(connection: socket.socket, process: Process) -> None:
    """End a program whose stand-in is gone."""
    with connection:
        connection.recv(1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _become(
    arguments: list[str],
    environment: dict[str, str],
    directory: str,
    streams: _Descriptors,
    ready: Connection,
) -> None:
    """Make this process what a fresh interpreter would be, and run the program in it."""
    os.setsid()
    for number, descriptor in enumerate(streams.numbers):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
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
