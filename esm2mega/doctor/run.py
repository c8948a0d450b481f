"""`esm2mega doctor` gathers all findings into one report, on one host or on all hosts of a job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from esm2mega.doctor import collectives, devices, directory, kernels, limits, packages, slurm
from esm2mega.doctor.child import run_apart
from esm2mega.doctor.finding import FAILED, MISSING, OK, WARNING, Finding
from esm2mega.errors import MachineError

ONE_HOST = "one host; started by torchrun or srun on several, doctor compares their clocks and files too"


def doctor(path: str | Path = ".", quick: bool = False) -> tuple[bool, str]:
    """Check this machine and the file system of a directory, where runs would be written.

    Under torchrun or srun, every host is checked by one of its processes, and rank 0 reports for all.

    Args:
        path: An existing directory; the check removes its own files again.
        quick: Leave out what needs PyTorch or other processes: a look at a machine that trains.

    Returns:
        Whether everything that is needed works, and the report, one line per finding; on other ranks than 0,
        True and nothing.
    """
    os.environ.update(slurm.variables_of_torchrun(os.environ))
    if quick and os.environ.get("RANK", "0") != "0":
        return True, ""
    if quick or os.environ.get("WORLD_SIZE", "1") == "1":
        return _report([*check_host(Path(path), quick), *([] if quick else [Finding(OK, ONE_HOST)])])
    return _report_of_hosts(Path(path))


def check_host(path: Path, quick: bool) -> Iterator[Finding]:
    """Yield everything that is found out about this host alone."""
    yield from packages.check_packages()
    yield devices.check_cpu()
    yield from limits.check_limits()
    yield from directory.check_directory(path)
    if quick:
        return
    yield from run_apart(
        __name__,
        "check_computing",
        "computing with torch and megatron-core",
        "reinstall both, and repair or uninstall what the line names",
        kernels.SECONDS + collectives.SECONDS,
    )
    yield from kernels.check_transformer_engine()
    yield collectives.check_gloo()


def check_computing() -> Iterator[Finding]:
    """Yield what needs PyTorch and Megatron-Core; it runs in a process of its own."""
    yield from devices.check_devices()
    yield from kernels.check_attention()
    yield from collectives.check_nccl()


def _report(findings: list[Finding]) -> tuple[bool, str]:
    number = {
        state: sum(finding.state == state for finding in findings) for state in (FAILED, MISSING, WARNING)
    }
    verdict = (
        f"FAILED: {number[FAILED]} of {len(findings)} checks, see the cures"
        if number[FAILED]
        else "this machine can train"
    )
    warnings = f", {number[WARNING]} warning{'s' * (number[WARNING] > 1)}" if number[WARNING] else ""
    last = f"{verdict} ({number[MISSING]} optional missing{warnings})"
    return not number[FAILED], "\n".join([*map(str, findings), last])


def _report_of_hosts(path: Path) -> tuple[bool, str]:
    from esm2mega.doctor.hosts import Hosts

    try:
        hosts = Hosts()
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0].rstrip(".")
        what = f"{os.environ['WORLD_SIZE']} processes do not meet at {address}: {reason}"
        cure = "start all of them at the same time, and open the ports between the hosts"
        if os.environ["RANK"] != "0":
            raise MachineError(f"{what}; {cure}") from error
        return _report([*check_host(path, quick=False), Finding(FAILED, what, cure)])
    findings = list(check_host(path, quick=False)) if hosts.rank in hosts.names else []
    try:
        if hosts.rank in hosts.names:
            findings = [*hosts.collect(findings), *hosts.compare(path)]
        hosts.leave()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise MachineError(f"another host ended or hangs ({reason}); read its message") from error
    return _report(findings) if hosts.rank == 0 else (True, "")
