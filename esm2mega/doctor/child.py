"""Runs checks in a fresh interpreter, since a broken package may end the process that imports it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

from esm2mega.doctor.finding import FAILED, Finding
from esm2mega.processes import end_with_parent

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
"""Are variables of torchrun by which a child would take itself for a rank of the caller's world."""

_CODE = """
import sys
sys.path[:] = {path!r}
from esm2mega.doctor.child import report
report({module!r}, {function!r}, {out!r})
"""


def run_apart(
    module: str, function: str, what: str, cure: str, timeout: float, state: str = FAILED
) -> list[Finding]:
    """Return the findings that a function of a module yields in a process of its own.

    Args:
        module: Its full name.
        function: A function without arguments that yields findings.
        what: What the findings are about, for one that says that the process did not end well.
        cure: The cure of that one.
        timeout: Seconds for the process, its imports included.
        state: The state of that one.
    """
    with tempfile.TemporaryDirectory(prefix="esm2mega-doctor-") as folder:
        out, err = Path(folder, "findings"), Path(folder, "stderr")
        code = _CODE.format(path=sys.path, module=module, function=function, out=str(out))
        with err.open("w") as stderr:
            # A session of its own: what it starts ends with it.
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            try:
                status = process.wait(timeout)
                defect = "" if status == 0 else last_words(err.read_text(errors="replace"), status)
            except subprocess.TimeoutExpired:
                defect = f"no answer within {timeout:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        findings = [Finding(*line) for line in json.loads(out.read_text())] if out.exists() else []
    return findings if not defect else [*findings, Finding(state, f"{what}: {defect}", cure)]


def report(module: str, function: str, out: str) -> None:
    """Write the findings of a function to a file after each of them; the child process calls this."""
    findings = []
    for finding in getattr(importlib.import_module(module), function)():
        findings.append(astuple(finding))
        Path(out).write_text(json.dumps(findings))


def child_environment() -> dict[str, str]:
    """Return the variables of this process without those of a launcher."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER}


def last_words(err: str, status: int) -> str:
    """Return the last line that a process wrote to stderr, or how it ended if it wrote nothing."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = err.strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"
