"""Limits that are too low are found in a process that has them."""

import resource
import subprocess
import sys

import pytest

from esm2mega.doctor import limits
from esm2mega.doctor.finding import FAILED, OK, WARNING
from esm2mega.doctor.limits import check_limits

CODE = """
import resource, sys
from pathlib import Path
from esm2mega.doctor import limits
limits.INFINIBAND, limits.CORE_PATTERN = Path("/"), Path("/absent")
for name, soft, hard in ({changes}):
    limit = getattr(resource, f"RLIMIT_{{name}}")
    resource.setrlimit(limit, (soft, resource.getrlimit(limit)[1] if hard is None else hard))
print(*limits.check_limits(), sep="\\n")
"""


def lines_under(changes: str) -> list[str]:
    code = CODE.format(changes=changes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_low_limits_fail_with_a_cure_that_the_hard_limits_allow():
    files, threads, size, locked, core = lines_under(
        '("NOFILE", 256, 4096), ("NPROC", 100, 100), ("FSIZE", 2**20, 2**21), ("MEMLOCK", 65536, 65536), '
        '("CORE", 0, 0)'
    )
    assert files == "FAILED   open files: 256, and runs need 1024; ulimit -n $(ulimit -H -n)"
    assert threads == (
        "FAILED   processes and threads: 100, and runs need 1024; let an administrator raise it in "
        "/etc/security/limits.conf, or docker run --ulimit nproc=65536"
    )
    assert size.startswith("FAILED   size of a file: 1 MiB, and runs need 10,240 MiB; let an administrator")
    assert locked.startswith("warning  locked memory: 0 MiB, and runs need 1,024 MiB; let an administrator")
    assert core == "ok       core files: 0 MiB"


def test_a_hard_limit_that_is_open_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (10, resource.RLIM_INFINITY))
    cures = [finding.cure for finding in check_limits() if finding.state == FAILED]
    assert cures == ["ulimit -n unlimited", "ulimit -u unlimited", "ulimit -f unlimited"]


def test_open_limits_are_fine(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY,) * 2)
    *others, core = check_limits()
    assert {finding.state for finding in others} == {OK}
    assert all("unlimited" in finding.what for finding in others)


@pytest.mark.parametrize(
    ("pattern", "state"), [("core.%p", WARNING), ("|/usr/lib/systemd/systemd-coredump %P", OK)]
)
def test_core_files_without_bound_are_a_warning(tmp_path, monkeypatch, pattern, state):
    (tmp_path / "core_pattern").write_text(pattern)
    monkeypatch.setattr(limits, "CORE_PATTERN", tmp_path / "core_pattern")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY,) * 2)
    *_, core = check_limits()
    assert core.state == state


def test_locked_memory_matters_with_infiniband_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (2**16, 2**16))
    assert [f.state for f in check_limits() if f.what.startswith("locked")] == [OK]
    (tmp_path / "mlx5_0").mkdir()
    assert [f.state for f in check_limits() if f.what.startswith("locked")] == [WARNING]
