"""The store where processes meet: which variables it needs, and how long a process hosts it."""

from __future__ import annotations

import socket

import pytest

from esm2mega.cli import app
from esm2mega.errors import UserError
from esm2mega.parallel import rendezvous
from tests.ranks import free_port


@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["MASTER_PORT"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_a_rank_without_an_address_is_told_to_start_with_torchrun(
    missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in found.items():
        if name in missing:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        rendezvous.meet()
    assert str(caught.value) == (
        f"RANK=0 is set, as for one of several processes, but not {' or '.join(missing)}; "
        "start with torchrun, which sets all of them, or unset RANK"
    )


def test_a_command_without_an_address_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.main(["evaluate", "absent", "--data", "absent"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "esm2mega: [rank 0] error: RANK=0 is set, as for one of several processes, but not MASTER_ADDR or "
        "MASTER_PORT; start with torchrun, which sets all of them, or unset RANK"
    ]


def test_a_port_in_use_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "_met", None)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", **address}.items():
            monkeypatch.setenv(name, value)
        assert app.main(["evaluate", "absent", "--data", "absent"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"esm2mega: [rank 0] error: MASTER_PORT={port}: another process of this host uses it; set "
        "MASTER_PORT to another port, the same for all processes"
    ]


def test_a_process_hosts_one_store_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_hosted", None)
    monkeypatch.setattr(rendezvous, "_met", None)
    ports = [free_port() for _ in range(3)]
    for number, port in enumerate(ports):
        for name, value in {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        store = rendezvous.meet()
        assert [rendezvous.next_number(store, "test", rank=0) for _ in range(2)] == [1, 2], "counts anew"
        del store
        rendezvous.leave()
        socket.create_connection(("127.0.0.1", port), timeout=10).close()  # others may still be reading
        for earlier in ports[:number]:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", earlier), timeout=10)
