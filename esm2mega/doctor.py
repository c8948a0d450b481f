"""`esm2mega doctor` checks by small trials whether this machine can train, and names the cures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from esm2mega.processes import end_with_parent

OK, MISSING, FAILED = "ok", "missing", "FAILED"
COLLECTIVE_SECONDS = 60.0
FREE_GIB = 1.0


@dataclass(frozen=True)
class Finding:
    """Holds a line of the report; `missing` is optional and only noted, `FAILED` makes the machine unfit."""

    state: str
    what: str
    cure: str = ""

    def __str__(self) -> str:
        """Return the line as it is printed."""
        return f"{self.state:<8} {self.what}" + (f"; {self.cure}" if self.cure else "")


@dataclass(frozen=True)
class OptionalPackage:
    """Describes a package that makes something faster or possible, and is never needed on a CPU."""

    distribution: str
    module: str
    use: str
    cure: str


OPTIONAL = (
    OptionalPackage(
        "transformer-engine",
        "transformer_engine",
        "fused layers and FP8 on CUDA",
        "pip install 'esm2mega[te]' on a CUDA machine",
    ),
    OptionalPackage(
        "flash-attn",
        "flash_attn",
        "packed attention on CUDA",
        "pip install flash-attn on a CUDA machine",
    ),
    OptionalPackage(
        "apex",
        "apex",
        "fused Adam on CUDA",
        "build it from its source on a CUDA machine; torch's Adam is used without it",
    ),
    OptionalPackage("matplotlib", "matplotlib", "esm2mega plot", "pip install matplotlib"),
    OptionalPackage("tensorboard", "tensorboard", "logging.tensorboard", "pip install 'esm2mega[logging]'"),
    OptionalPackage("wandb", "wandb", "logging.wandb", "pip install 'esm2mega[logging]'"),
)


def doctor(directory: str | Path = ".", timeout: float = COLLECTIVE_SECONDS) -> tuple[bool, str]:
    """Check this machine and the file system of `directory`, where runs would be written.

    Args:
        directory: An existing directory; the check removes its own files again.
        timeout: Seconds for the two processes to start, import torch and finish their all-reduce.

    Returns:
        Whether everything that is needed works, and the report, one line per finding.
    """
    findings = [
        *check_versions(),
        *check_devices(),
        *check_attention(),
        check_collective(timeout),
        *check_directory(Path(directory)),
    ]
    failed = sum(finding.state == FAILED for finding in findings)
    missing = sum(finding.state == MISSING for finding in findings)
    verdict = (
        f"FAILED: {failed} of {len(findings)} checks, see the cures" if failed else "this machine can train"
    )
    return not failed, "\n".join([*map(str, findings), f"{verdict} ({missing} optional missing)"])


def check_versions() -> Iterator[Finding]:
    """Yield Python, the required packages and the optional ones with their versions."""
    yield Finding(OK, f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _check_requirements()
    for package in OPTIONAL:
        found = installed_version(package.distribution)
        if found is None and importlib.util.find_spec(package.module) is None:
            yield Finding(MISSING, f"{package.distribution} ({package.use})", package.cure)
        else:
            yield Finding(OK, f"{package.distribution} {found or 'of unknown version'} ({package.use})")


def _check_requirements() -> Iterator[Finding]:
    """Compare every package that the installed esm2mega requires here with the versions that it allows."""
    try:
        lines = importlib.metadata.requires("esm2mega") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            MISSING,
            "requirements of esm2mega: not known, since it runs without being installed",
            "pip install --editable . in its folder",
        )
        return
    # With an empty extra, the markers of all extras are false.
    requirements = [
        r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})
    ]
    for requirement in requirements:
        found, needs = installed_version(requirement.name), f"{requirement.name}{requirement.specifier}"
        if found is None:
            yield Finding(FAILED, f"{requirement.name} is not installed", f"pip install '{needs}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding(FAILED, f"{requirement.name} {found} is not supported", f"pip install '{needs}'")
        else:
            yield Finding(OK, f"{requirement.name} {found}")


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_devices() -> Iterator[Finding]:
    """Yield the CPU with the cores that this process may use, and every CUDA device."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    yield Finding(OK, f"cpu: {cores} core{'s' * (cores > 1)} usable, OMP_NUM_THREADS={_threads()}")
    if installed_version("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else " and this torch is a CPU build"
        yield Finding(MISSING, f"cuda device: none found{build}", "training runs on the CPU over gloo")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        yield Finding(
            OK, f"cuda:{index}: {properties.name}, {memory:.0f} GiB, compute capability {capability}"
        )


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", "unset")


def check_attention() -> Iterator[Finding]:
    """Yield which values of `model.attention_backend` this machine can run; `sdpa` runs everywhere."""
    if installed_version("torch") is None:
        yield Finding(FAILED, "attention backend sdpa", "pip install torch")
        return
    import torch

    yield Finding(OK, "attention backend sdpa: usable on every device")
    cuda = torch.cuda.is_available()
    for backend, module, cure in (
        ("varlen", "torch.nn.attention.varlen", "install torch 2.10 or newer"),
        ("flash", "flash_attn", OPTIONAL[1].cure),
        ("te", "transformer_engine", OPTIONAL[0].cure),
    ):
        there = _has_module(module)
        if there and cuda:
            yield Finding(OK, f"attention backend {backend}: usable")
        elif there:
            yield Finding(
                MISSING, f"attention backend {backend}: module {module} found", "it needs a CUDA device"
            )
        else:
            yield Finding(MISSING, f"attention backend {backend}: no module {module}", cure)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def check_collective(timeout: float = COLLECTIVE_SECONDS) -> Finding:
    """Start two processes that all-reduce a tensor over gloo on this host, as a two-process CPU run does."""
    what = "2-process gloo all-reduce on this host"
    address, port = "127.0.0.1", _free_port()
    command = [sys.executable, "-c", _ALL_REDUCE, address, str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    workers = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,
        )
        for rank in range(2)
    ]
    try:
        outputs = [
            worker.communicate(timeout=max(0.1, started + timeout - time.monotonic())) for worker in workers
        ]
    except subprocess.TimeoutExpired:
        return Finding(
            FAILED,
            f"{what}: no answer within {timeout:.0f} s",
            "let processes reach each other on the loopback interface (firewall, GLOO_SOCKET_IFNAME)",
        )
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.communicate()
    for rank, (worker, (out, err)) in enumerate(zip(workers, outputs, strict=True)):
        if worker.returncode != 0 or out.strip() != "3.0":
            lines = err.strip().splitlines() or [f"exit status {worker.returncode}, printed {out.strip()!r}"]
            return Finding(
                FAILED,
                f"{what}: rank {rank}: {lines[-1]}",
                "reinstall torch with gloo, or set GLOO_SOCKET_IFNAME to a working interface",
            )
    return Finding(OK, f"{what}: {time.monotonic() - started:.1f} s with start-up")


# Rank r contributes r + 1, so the right sum of two ranks is 3: neither one rank's own value nor a mean.
_ALL_REDUCE = """
import datetime, sys
import torch
import torch.distributed as dist
address, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", world_size=2, rank=rank,
                        timeout=datetime.timedelta(seconds=30))
value = torch.tensor([rank + 1.0])
dist.all_reduce(value)
print(value.item())
dist.destroy_process_group()
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_directory(directory: Path) -> Iterator[Finding]:
    """Try in `directory` what writing a checkpoint needs: write and sync, rename a directory, free space."""
    what = f"directory {directory.resolve()}"
    if not directory.is_dir():
        yield Finding(FAILED, f"{what} does not exist", "create it or name another one")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".esm2mega-doctor-", dir=directory) as scratch:
            before, after = Path(scratch, "step.tmp"), Path(scratch, "step")
            before.mkdir()
            payload = os.urandom(1 << 20)
            with open(before / "data", "wb") as handle:
                handle.write(payload)
                handle.flush()
                os.fsync(handle.fileno())
            before.rename(after)
            if (after / "data").read_bytes() != payload:
                yield Finding(FAILED, f"{what}: read back other bytes than written", "do not keep runs there")
                return
        yield Finding(OK, f"{what}: write, sync, rename and read back")
        free = shutil.disk_usage(directory).free / 2**30
    except OSError as error:
        yield Finding(
            FAILED,
            f"{what}: {error.strerror or error}",
            "fix its permissions, free space or name another one",
        )
        return
    if free < FREE_GIB:
        yield Finding(
            FAILED,
            f"{what}: {free:.1f} GiB free",
            f"free at least {FREE_GIB:.0f} GiB for checkpoints, or name another one",
        )
    else:
        yield Finding(OK, f"{what}: {free:.0f} GiB free")
