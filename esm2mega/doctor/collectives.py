"""Checks collectives between processes: gloo on this host, and NCCL between its GPUs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from esm2mega.doctor.child import child_environment, last_words
from esm2mega.doctor.finding import FAILED, MISSING, OK, Finding
from esm2mega.processes import end_with_parent

SECONDS = 60.0
"""Limits how long processes take to start, import torch and finish their all-reduce."""

GLOO_CURE = "reinstall torch with gloo, or set GLOO_SOCKET_IFNAME to a working interface"
NCCL_CURE = (
    "read NCCL_DEBUG=INFO; in a container give shared memory (--ipc host), else try NCCL_P2P_DISABLE=1"
)


def check_gloo(timeout: float = SECONDS) -> Finding:
    """Let two processes all-reduce a tensor over gloo on this host, as a two-process CPU run does."""
    return _all_reduce("gloo", 2, "2-process gloo all-reduce on this host", GLOO_CURE, timeout)


def check_nccl(timeout: float = SECONDS) -> Iterator[Finding]:
    """Yield the version of NCCL, and an all-reduce over it with one process for each GPU of this host."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        yield Finding(MISSING, "nccl: no CUDA device to use it on", "processes on a CPU talk over gloo")
        return
    if not dist.is_nccl_available():
        yield Finding(FAILED, "nccl: not in this build of torch", "install torch for CUDA on Linux")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    count = torch.cuda.device_count()
    what = f"{count}-process nccl {version} all-reduce on the GPU{'s' * (count > 1)} of this host"
    yield _all_reduce("nccl", count, what, NCCL_CURE, timeout)


def _all_reduce(backend: str, world_size: int, what: str, cure: str, timeout: float) -> Finding:
    # Processes that meet in a file need no port, which another program could take before them.
    with tempfile.TemporaryDirectory(prefix="esm2mega-doctor-") as folder:
        meeting = Path(folder, "meeting").as_uri()
        return _all_reduce_at(meeting, backend, world_size, what, cure, timeout)


def _all_reduce_at(
    meeting: str, backend: str, world_size: int, what: str, cure: str, timeout: float
) -> Finding:
    command = [sys.executable, "-c", _ALL_REDUCE, backend, meeting, str(world_size)]
    environment = {**child_environment(), "OMP_NUM_THREADS": "1"}
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
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
        for rank in range(world_size)
    ]
    try:
        outputs = [
            worker.communicate(timeout=max(0.1, started + timeout - time.monotonic())) for worker in workers
        ]
    except subprocess.TimeoutExpired:
        return Finding(
            FAILED,
            f"{what}: no answer within {timeout:.0f} s",
            "let processes reach each other on the loopback interface (firewall, GLOO_SOCKET_IFNAME)"
            if backend == "gloo"
            else cure,
        )
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.communicate()
    total = f"{world_size * (world_size + 1) / 2}"
    for rank, (worker, (out, err)) in enumerate(zip(workers, outputs, strict=True)):
        # NCCL greets on stdout.
        answer = out.strip().rpartition("\n")[2]
        if worker.returncode != 0 or answer != total:
            words = last_words(err, worker.returncode) if worker.returncode else f"printed {answer!r}"
            return Finding(FAILED, f"{what}: rank {rank}: {words}", cure)
    return Finding(OK, f"{what}: {time.monotonic() - started:.1f} s with start-up")


# Rank r contributes r + 1, so the right sum of two ranks is 3: neither one rank's own value nor a mean.
_ALL_REDUCE = """
import datetime, sys
import torch
import torch.distributed as dist
backend, meeting, size, rank = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method=meeting, world_size=size, rank=rank,
                        timeout=datetime.timedelta(seconds=30))
value = torch.tensor([rank + 1.0], device=device)
dist.all_reduce(value)
print(value.item())
dist.destroy_process_group()
"""
