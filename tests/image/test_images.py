"""What the Dockerfiles promise: a user, a health check, and everything that the README's commands need."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.cli.test_page_commands import parse_with_click
from tests.image import dockerfile

ROOT = Path(__file__).parents[2]
CPU = ROOT / "docker" / "cpu.Dockerfile"
GPU = ROOT / "Dockerfile"
SETUP = (ROOT / "setup.py").read_text()

both = pytest.mark.parametrize("path", [CPU, GPU], ids=lambda path: path.name)


def arguments(path: Path) -> dict[str, str]:
    """The ARGs of a file with their defaults."""
    words = [each for each in dockerfile.instructions(path.read_text()) if each.word == "ARG"]
    return {name: default for name, _, default in (each.rest.partition("=") for each in words)}


@both
def test_the_base_is_an_argument(path: Path) -> None:
    first, second, *_ = dockerfile.instructions(path.read_text())
    assert (first.word, second.word, second.rest) == ("ARG", "FROM", "${BASE_IMAGE}")
    assert dockerfile.read(path, {"BASE_IMAGE": "mine:1"}).base == "mine:1"


def test_the_base_with_cuda_has_a_supported_torch() -> None:
    """Within the bounds of setup.py, and with a varlen_attn that takes a scale, which came with 2.11."""
    found = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda.*", dockerfile.read(GPU).base)
    torch = re.search(r'"(torch[<>].*?)"', SETUP)
    assert found is not None and torch is not None
    assert Requirement(torch[1]).specifier.contains(found[1])
    assert Version(found[1]) >= Version("2.11")


@both
def test_no_registry_is_named(path: Path) -> None:
    assert re.findall(r"[\w-]+\.(?:io|com|org|net|dev)\b", path.read_text()) == []


@both
def test_every_extra_that_a_command_needs_is_installed(path: Path) -> None:
    """All of setup.py, but for tests, and for what needs a GPU's compiler or only compares."""
    extras = set(re.findall(r'^        "(\w+)": ', SETUP.partition("extras_require")[2], re.MULTILINE))
    assert set(arguments(path)["EXTRAS"].split(",")) == extras - {"dev", "te", "hf"}


@both
def test_what_is_copied_exists_and_is_sent_to_the_build(path: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    copies = [step.text.split()[:-1] for step in dockerfile.read(path).steps if step.word == "COPY"]
    copied = [name for names in copies for name in names]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    # The environments and runs of a checkout are many gigabytes.
    assert set(copied) == sent and "*" in lines


@both
def test_the_shell_is_valid(path: Path) -> None:
    for step in dockerfile.read(path).steps:
        if step.word == "RUN":
            subprocess.run(["bash", "-n", "-c", step.text], check=True, capture_output=True)


@both
def test_it_runs_as_a_user_and_as_any(path: Path) -> None:
    image = dockerfile.read(path)
    # By number: an orchestrator that forbids root cannot look a name up.
    assert re.fullmatch(r"[1-9]\d+", image.user)
    assert any('chmod 1777 "${HOME}" ' + image.workdir in step.text for step in image.steps)
    assert image.environment["USER"], "a number without a name has none"


@both
def test_the_last_step_is_the_proof_as_the_user(path: Path) -> None:
    last = dockerfile.read(path).steps[-1]
    assert (last.user, last.workdir) == (dockerfile.read(path).user, "/work")
    example = re.search(r"bash /opt/esm2mega/(examples/\S+)", last.text)
    assert example is not None and (ROOT / example[1]).is_file()


@both
def test_the_doctor_is_the_health_check(path: Path) -> None:
    image = dockerfile.read(path)
    assert image.command == ["esm2mega", "--help"]
    first, *words = image.healthcheck
    assert first == "esm2mega"
    command, params = parse_with_click(words)
    assert command == "esm2mega doctor" and params["quick"]


def test_both_end_alike() -> None:
    """From the user on, so that a change of one is made in the other."""
    cpu, gpu = (path.read_text().partition("# With `--user NUMBER`")[2] for path in (CPU, GPU))
    different = {"a check on the GPUs would take memory from a training"}
    different |= {"some seconds of one core would disturb a training"}
    for text in different:
        cpu, gpu = cpu.replace(text, ""), gpu.replace(text, "")
    assert cpu == gpu != ""


def test_lint_checks_every_dockerfile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "hadolint Dockerfile $(wildcard docker/*.Dockerfile)" in makefile
    assert {path.name for path in (ROOT / "docker").iterdir()} == {CPU.name}


@both
def test_the_linter_is_content(path: Path) -> None:
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@both
def test_every_line_that_the_linter_ignores_has_a_reason(path: Path) -> None:
    lines = path.read_text().splitlines()
    ignored = [number for number, line in enumerate(lines) if line.startswith("# hadolint ignore=")]
    assert ignored
    assert all(re.match(r"# \w.*\.$", lines[number - 1]) for number in ignored)
