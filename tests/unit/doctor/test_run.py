"""The report as a whole: its verdict, its order, and what a quick look leaves out."""

import subprocess
import sys
from datetime import timedelta

import pytest

from esm2mega.doctor import hosts, run
from esm2mega.doctor.finding import FAILED, MISSING, OK, WARNING, Finding
from esm2mega.doctor.run import doctor
from esm2mega.errors import MachineError
from tests.ranks import free_port


def test_a_sound_machine_is_ok_and_optional_packages_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(run.packages, "installed_version", lambda name: None if name == "wandb" else "2.13")
    monkeypatch.setattr(run.packages.importlib.metadata, "requires", lambda name: ["torch>=2.6"])
    works, text = doctor(tmp_path, quick=True)
    lines = text.splitlines()
    assert works
    for line in ("torch 2", "cpu: ", "open files: ", f"directory {tmp_path}: write", "core files"):
        assert any(each.startswith((f"ok       {line}", f"warning  {line}")) for each in lines), line
    assert any(line.startswith("missing  wandb") for line in lines)
    assert lines[-1].startswith("this machine can train (1 optional missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("states", "works", "verdict"),
    [
        ([OK], True, "this machine can train (0 optional missing)"),
        ([OK, MISSING, WARNING], True, "this machine can train (1 optional missing, 1 warning)"),
        ([WARNING, WARNING], True, "this machine can train (0 optional missing, 2 warnings)"),
        ([OK, FAILED], False, "FAILED: 1 of 2 checks, see the cures (0 optional missing)"),
    ],
)
def test_the_verdict_counts(monkeypatch, states, works, verdict):
    monkeypatch.setattr(run, "check_host", lambda path, quick: [Finding(state, "x") for state in states])
    worked, text = doctor(quick=True)
    assert worked == works
    assert text.splitlines()[-1] == verdict


def test_a_full_report_tries_everything_and_says_that_it_is_for_one_host(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run_apart", lambda module, function, *rest: [Finding(OK, function)])
    monkeypatch.setattr(run.kernels, "check_transformer_engine", lambda: [Finding(OK, "kernels")])
    monkeypatch.setattr(run.collectives, "check_gloo", lambda: Finding(OK, "gloo"))
    lines = doctor(tmp_path)[1].splitlines()
    assert lines[-5:-1] == [
        *("ok       check_computing", "ok       kernels", "ok       gloo"),
        f"ok       {run.ONE_HOST}",
    ]


def test_what_computes_is_tried_in_order(monkeypatch):
    for module, function in (
        *((run.devices, "check_devices"), (run.kernels, "check_attention"), (run.collectives, "check_nccl")),
    ):
        monkeypatch.setattr(module, function, lambda function=function: [function])
    assert list(run.check_computing()) == ["check_devices", "check_attention", "check_nccl"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_meet_are_a_finding(monkeypatch, rank):
    port = free_port()
    variables = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts.Hosts.__init__, "__defaults__", (timedelta(seconds=1),))
    monkeypatch.setattr(run, "check_host", lambda path, quick: [])
    expected = f"2 processes do not meet at 127.0.0.1:{port}: "
    if rank == "0":
        works, text = doctor()
        assert not works and text.startswith(f"FAILED   {expected}")
    else:
        with pytest.raises(MachineError, match=expected):
            doctor()
    hosts.rendezvous.leave()


def test_a_quick_look_imports_no_torch_and_starts_no_rank(tmp_path):
    code = (
        "import sys; from esm2mega.doctor.run import doctor; "
        f"doctor({str(tmp_path)!r}, quick=True); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
