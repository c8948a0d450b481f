"""The doctor tells what works by trying it, and what to do about what does not."""

import sys

import pytest

from esm2mega import doctor as doctor_module
from esm2mega.doctor import (
    FAILED,
    MISSING,
    OK,
    Finding,
    check_collective,
    check_directory,
    check_versions,
    doctor,
)


def test_a_line_has_state_subject_and_cure():
    assert str(Finding(OK, "torch 2.13")) == "ok       torch 2.13"
    assert str(Finding(MISSING, "apex", "build it")) == "missing  apex; build it"


@pytest.fixture
def without_processes(monkeypatch):
    monkeypatch.setattr(doctor_module, "check_collective", lambda timeout: Finding(OK, "all-reduce"))


@pytest.fixture(autouse=True)
def requirements(monkeypatch):
    """Those of the installed package, which the tests do without; fill in others."""
    lines = [
        "torch<2.15,>=2.6",
        "megatron-core>=0.16; python_version >= '3.10'",
        "megatron-core==0.1; python_version < '3.10'",
        "click>=8.2",
        "wandb; extra == 'logging'",
    ]
    monkeypatch.setattr(doctor_module.importlib.metadata, "requires", lambda name: lines)
    return lines


def test_requirements_are_those_of_this_machine():
    states = [str(finding) for finding in doctor_module._check_requirements()]
    assert [line.split()[:2] for line in states] == [["ok", n] for n in ("torch", "megatron-core", "click")]


def test_an_unsupported_version_fails_with_its_cure(requirements, monkeypatch):
    found = doctor_module.installed_version
    versions = {"torch": "2.15.0+cu128", "megatron-core": "0.15.3"}
    monkeypatch.setattr(doctor_module, "installed_version", lambda name: versions.get(name) or found(name))
    lines = [str(finding) for finding in doctor_module._check_requirements()]
    assert lines[:2] == [
        "FAILED   torch 2.15.0+cu128 is not supported; pip install 'torch<2.15,>=2.6'",
        "FAILED   megatron-core 0.15.3 is not supported; pip install 'megatron-core>=0.16'",
    ]


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def absent(name):
        raise doctor_module.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor_module.importlib.metadata, "requires", absent)
    (finding,) = doctor_module._check_requirements()
    assert finding.state == MISSING


def test_a_sound_machine_is_ok_and_optional_packages_do_not_matter(tmp_path, monkeypatch, without_processes):
    found = doctor_module.installed_version
    monkeypatch.setattr(
        doctor_module, "installed_version", lambda name: None if name == "wandb" else found(name)
    )
    works, text = doctor(tmp_path)
    lines = text.splitlines()
    assert works
    assert any(line.startswith("ok       torch 2") for line in lines)
    assert any(line.startswith("ok       attention backend sdpa") for line in lines)
    assert any(line.startswith("ok       cpu: ") for line in lines)
    assert any(line.endswith("GiB free") for line in lines)
    assert lines[-1].startswith("this machine can train")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_requirement_fails_with_its_cure(monkeypatch, tmp_path, without_processes):
    found = doctor_module.installed_version
    monkeypatch.setattr(
        doctor_module, "installed_version", lambda name: None if name == "megatron-core" else found(name)
    )
    lines = [str(finding) for finding in check_versions()]
    assert "FAILED   megatron-core is not installed; pip install 'megatron-core>=0.16'" in lines
    works, text = doctor(tmp_path)
    assert not works
    assert text.splitlines()[-1].startswith("FAILED: 1 of ")


@pytest.mark.distributed
def test_two_real_processes_reduce():
    finding = check_collective(timeout=120)
    assert finding.state == OK, str(finding)


def test_a_rank_that_fails_is_named_with_its_last_line(monkeypatch):
    monkeypatch.setattr(
        doctor_module,
        "_ALL_REDUCE",
        "import sys\nif sys.argv[3] == '1':\n    sys.exit('no interface')\nprint(3.0)",
    )
    finding = check_collective(timeout=30)
    assert finding.state == FAILED
    assert "rank 1: no interface" in finding.what


def test_a_wrong_sum_is_a_failure(monkeypatch):
    monkeypatch.setattr(doctor_module, "_ALL_REDUCE", "print(1.0)")
    finding = check_collective(timeout=30)
    assert finding.state == FAILED
    assert "printed '1.0'" in finding.what


def test_hanging_processes_are_ended_at_the_timeout(monkeypatch, tmp_path):
    started = tmp_path / "pids"
    monkeypatch.setattr(
        doctor_module,
        "_ALL_REDUCE",
        f"import os, time\nopen({str(started)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(600)",
    )
    finding = check_collective(timeout=2)
    assert finding.state == FAILED
    assert "no answer within 2 s" in finding.what
    for pid in map(int, started.read_text().split()):
        with pytest.raises(ProcessLookupError):
            doctor_module.os.kill(pid, 0)


def test_directory_that_cannot_be_used(tmp_path, monkeypatch):
    (finding,) = check_directory(tmp_path / "absent")
    assert finding.state == FAILED
    assert "does not exist" in finding.what

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor_module.os, "fsync", refuse)
    (finding,) = check_directory(tmp_path)
    assert finding.state == FAILED
    assert "No space left on device" in finding.what
    assert list(tmp_path.iterdir()) == []


def test_little_free_space_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_module, "FREE_GIB", 1e9)
    works, free = check_directory(tmp_path)
    assert works.state == OK
    assert free.state == FAILED
    assert "GiB free; free at least" in str(free)


def test_importing_the_doctor_needs_no_torch():
    code = "import sys; import esm2mega.doctor; sys.exit('torch' in sys.modules)"
    assert doctor_module.subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
