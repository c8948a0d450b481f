"""Collectives between real processes, and what is said of those that fail."""

import os

import pytest
import torch

from esm2mega.doctor import collectives
from esm2mega.doctor.collectives import check_gloo, check_nccl
from esm2mega.doctor.finding import FAILED, MISSING, OK


@pytest.mark.distributed
def test_two_real_processes_reduce():
    finding = check_gloo(timeout=120)
    assert finding.state == OK, str(finding)


def test_a_rank_that_fails_is_named_with_its_last_line(monkeypatch):
    program = "import sys\nif sys.argv[4] == '1':\n    sys.exit('no interface')\nprint(3.0)"
    monkeypatch.setattr(collectives, "_ALL_REDUCE", program)
    finding = check_gloo(timeout=30)
    assert finding.state == FAILED
    assert "rank 1: no interface" in finding.what


def test_a_wrong_sum_is_a_failure(monkeypatch):
    monkeypatch.setattr(collectives, "_ALL_REDUCE", "print(1.0)")
    finding = check_gloo(timeout=30)
    assert finding.state == FAILED
    assert "printed '1.0'" in finding.what


def test_hanging_processes_are_ended_at_the_timeout(monkeypatch, tmp_path):
    started = tmp_path / "pids"
    program = f"import os, time\nopen({str(started)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(600)"
    monkeypatch.setattr(collectives, "_ALL_REDUCE", program)
    finding = check_gloo(timeout=2)
    assert finding.state == FAILED
    assert "no answer within 2 s" in finding.what
    for pid in map(int, started.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nccl_needs_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = check_nccl()
    assert finding.state == MISSING


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs, on which NCCL 2.27.3 runs a program that the test gives."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    return lambda program: monkeypatch.setattr(collectives, "_ALL_REDUCE", program)


def test_a_build_without_nccl_fails_on_gpus(gpus, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    (finding,) = check_nccl()
    assert finding.state == FAILED


@pytest.mark.parametrize(
    ("program", "state", "text"),
    [
        ("print('NCCL version 2.27.3\\n6.0')", OK, "3-process nccl 2.27.3 all-reduce on the GPUs"),
        ("print(1.0)", FAILED, "rank 0: printed '1.0'"),
        (
            "import sys; sys.exit('NCCL error: no space left on /dev/shm')",
            FAILED,
            "no space left on /dev/shm",
        ),
        ("import os; os.kill(os.getpid(), 11)", FAILED, "ended by SIGSEGV"),
    ],
)
def test_nccl_is_tried_with_a_process_for_each_gpu(gpus, program, state, text):
    gpus(program)
    (finding,) = check_nccl(timeout=30)
    assert finding.state == state
    assert text in finding.what


@pytest.mark.gpu
def test_nccl_reduces_on_real_gpus():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    (finding,) = check_nccl(timeout=120)
    assert finding.state == OK, str(finding)
