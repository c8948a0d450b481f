"""The variables of torchrun say which process this is, or are refused in one line by every command."""

from __future__ import annotations

import pytest

from esm2mega.cli.app import main
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.errors import UserError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    for name, _, value in (word.partition("=") for word in variables.split()):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "size"),
    [("", 1), ("WORLD_SIZE=1", 1), ("RANK=0 WORLD_SIZE=1", 1), ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1", 4)],
)
def test_number_of_processes(monkeypatch: pytest.MonkeyPatch, variables: str, size: int) -> None:
    set_all(monkeypatch, variables)
    assert world_size_from_environment() == size


BAD = [
    ("RANK=0", "RANK=0 is set, as for one of several processes, but not WORLD_SIZE"),
    ("RANK=1", "RANK=1 is set, as for one of several processes, but not WORLD_SIZE"),
    ("WORLD_SIZE=2", "WORLD_SIZE=2 is set, as for one of several processes, but not RANK"),
    ("RANK=2 WORLD_SIZE=2", "RANK=2 is not below WORLD_SIZE=2"),
    ("RANK= WORLD_SIZE=2", "variable RANK= is not the number of a process"),
    ("RANK=x WORLD_SIZE=2", "variable RANK=x is not the number of a process"),
    ("RANK=-1 WORLD_SIZE=2", "variable RANK=-1 is not the number of a process"),
    ("RANK=٣ WORLD_SIZE=4", "variable RANK=٣ is not the number of a process"),
    ("RANK=0 WORLD_SIZE=", "variable WORLD_SIZE= is not a number of processes"),
    ("RANK=0 WORLD_SIZE=0", "variable WORLD_SIZE=0 is not a number of processes"),
    ("RANK=0 WORLD_SIZE=1e3", "variable WORLD_SIZE=1e3 is not a number of processes"),
    ("LOCAL_RANK=a", "variable LOCAL_RANK=a is not the number of a process"),
    ("RANK=0 WORLD_SIZE=2 MASTER_PORT=99999", "variable MASTER_PORT=99999 is not a port"),
    ("RANK=0 WORLD_SIZE=2 MASTER_PORT=http", "variable MASTER_PORT=http is not a port"),
]


@pytest.mark.parametrize(("variables", "message"), BAD)
def test_variables_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, variables: str, message: str) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        world_size_from_environment()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "fasta", "absent.fasta", "--out", "absent"],
        ["pretrain"],
        ["finetune"],
        ["embed", "absent", "absent", "--out", "absent"],
        ["convert", "absent", "absent", "--to", "hf"],
        ["lora", "merge", "absent", "--out", "absent"],
        ["inspect", "absent"],
        ["plot", "absent"],
        ["doctor"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(("variables", "message"), [BAD[0], BAD[1], BAD[2], BAD[3], BAD[4]])
def test_every_command_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    variables: str,
    message: str,
) -> None:
    """A process with a wrong rank would otherwise do nothing and report success."""
    set_all(monkeypatch, variables)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esm2mega: error: ") and message in line
