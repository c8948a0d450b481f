"""Versions are compared with what is required, and nothing is imported for it."""

import importlib.metadata
from pathlib import Path

import pytest

from esm2mega.doctor import packages
from esm2mega.doctor.finding import MISSING
from esm2mega.doctor.packages import check_packages, check_requirements


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
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    return lines


@pytest.fixture
def versions(monkeypatch):
    """What is installed; fill in other versions, or None."""
    changed: dict[str, str | None] = {}
    found = packages.installed_version
    monkeypatch.setattr(
        packages, "installed_version", lambda name: changed[name] if name in changed else found(name)
    )
    return changed


def test_requirements_are_those_of_this_machine():
    lines = [str(finding) for finding in check_requirements()]
    assert [line.split()[:2] for line in lines] == [["ok", n] for n in ("torch", "megatron-core", "click")]


def test_an_unsupported_version_fails_with_its_cure(versions):
    versions |= {"torch": "2.15.0+cu128", "megatron-core": "0.15.3"}
    assert [str(finding) for finding in check_requirements()][:2] == [
        "FAILED   torch 2.15.0+cu128 is not supported; pip install 'torch<2.15,>=2.6'",
        "FAILED   megatron-core 0.15.3 is not supported; pip install 'megatron-core>=0.16'",
    ]


def test_a_missing_requirement_fails_with_its_cure(versions):
    versions["megatron-core"] = None
    lines = [str(finding) for finding in check_packages()]
    assert "FAILED   megatron-core is not installed; pip install 'megatron-core>=0.16'" in lines


@pytest.mark.parametrize("name", packages.OPTIONAL)
def test_a_missing_optional_package_names_its_extra(versions, name):
    versions[name] = None
    (finding,) = (each for each in check_packages() if each.what.startswith(f"{name} ("))
    assert finding.state == MISSING
    extra = finding.cure.removeprefix("pip install 'esm2mega[").removesuffix("]'")
    setup = (Path(__file__).parents[3] / "setup.py").read_text()
    assert f'"{extra}": ' in setup and f'"{name}' in setup
    versions[name] = "1.0"
    assert f"ok       {name} 1.0" in "\n".join(map(str, check_packages()))


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    (finding,) = check_requirements()
    assert finding.state == MISSING
