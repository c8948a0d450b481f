"""What a check in a process of its own reports, however that process ends."""

import time
from pathlib import Path

import pytest

from esm2mega.doctor.child import run_apart
from esm2mega.doctor.finding import FAILED, MISSING, Finding


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a check whose code is given, in a module that only the child imports."""
    monkeypatch.syspath_prepend(tmp_path)

    def run_code(body: str, timeout: float = 30) -> list[Finding]:
        code = f"import os, sys, time\nfrom esm2mega.doctor.finding import Finding\ndef check():\n{body}\n"
        (tmp_path / "stand_in.py").write_text(code)
        return run_apart("stand_in", "check", "the check", "the cure", timeout)

    return run_code


def test_findings_come_back(run):
    found = run(
        "    print('noise')\n    yield Finding('ok', 'one')\n    yield Finding('missing', 'two', 'x')"
    )
    assert found == [Finding("ok", "one"), Finding(MISSING, "two", "x")]


@pytest.mark.parametrize(
    ("end", "defect"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12: "),
        ("os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("os._exit(3)", "exit status 3"),
    ],
)
def test_a_process_that_dies_is_a_finding_after_those_before(run, end, defect):
    first, last = run(f"    yield Finding('ok', 'one')\n    {end}")
    assert first == Finding("ok", "one")
    assert last.state == FAILED and last.cure == "the cure"
    assert last.what.startswith(f"the check: {defect}")


def test_a_process_that_hangs_is_ended_with_what_it_started(run, tmp_path):
    pids = tmp_path / "pids"
    (finding,) = run(
        f"    open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{os.fork() or os.getpid()}}')\n"
        "    time.sleep(600)\n    yield",
        timeout=5,
    )
    assert finding == Finding(FAILED, "the check: no answer within 5 s", "the cure")
    for pid in map(int, pids.read_text().split()):
        deadline = time.monotonic() + 10
        while not has_ended(pid):
            assert time.monotonic() < deadline, pid
            time.sleep(0.05)


def has_ended(pid: int) -> bool:
    """A process that ended may wait for its parent: a zombie."""
    try:
        return Path("/proc", str(pid), "stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_child_of_a_rank_is_no_rank(run, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    (finding,) = run("    yield Finding('ok', str(sorted(set(os.environ) & {'RANK', 'WORLD_SIZE'})))")
    assert finding.what == "[]"
