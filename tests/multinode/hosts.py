"""Two hosts on this machine: each has its own network, host name and processes, and they share its disk."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.namespaces import TrialFailed, name_hosts

DEVICE = "eth0"
RETRIES = 8
"""Value of net.ipv4.tcp_retries2: how often data are sent again before a connection is given up.

These are some 100 seconds. Linux's own 15 are a quarter of an hour, for which torchrun waits.
"""
_START = 'hostname "$0" && exec "$@"'


class Host:
    """One host: a network namespace with an end of the cable, and what runs in it."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._machine: subprocess.Popen[bytes] | None = None

    def connect(self) -> None:
        """Give the network devices their address, and switch them on."""
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", DEVICE)
        self.set_link("up")
        setting = f"echo {RETRIES} >/proc/sys/net/ipv4/tcp_retries2"
        _ip("netns", "exec", self.name, "sh", "-c", setting)

    def set_link(self, state: str) -> None:
        """Plug the cable in (``up``) or out (``down``)."""
        _ip("-n", self.name, "link", "set", DEVICE, state)

    def start(self, command: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
        """Run a command on this host, which runs nothing else; its output goes to a file."""
        uts = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        machine = ["ip", "netns", "exec", self.name, *uts, "bash", "-c", _START, self.name, *command]
        with output.open("wb") as file:
            self._machine = subprocess.Popen(
                machine, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def poll(self) -> int | None:
        """Return the exit code of the command; None while it runs."""
        assert self._machine is not None
        return self._machine.poll()

    def wait(self, timeout: float) -> int:
        """Wait for the end of the command, and return its exit code."""
        assert self._machine is not None
        return self._machine.wait(timeout)

    def kill(self) -> None:
        """End all processes of this host by SIGKILL, in one moment: the kernel ends its process namespace."""
        assert self._machine is not None
        self._machine.kill()
        self._machine.wait()


def make_hosts(folder: Path, addresses: Mapping[str, str]) -> list[Host]:
    """Make two hosts and the cable between them; for use inside of `tests.namespaces`."""
    folder.mkdir()
    name_hosts(folder, addresses)
    # Where `ip` keeps its namespaces; only this program sees what is mounted there.
    subprocess.run(["mount", "-t", "tmpfs", "hosts", "/run"], check=True)
    hosts = [Host(name, address) for name, address in addresses.items()]
    for host in hosts:
        _ip("netns", "add", host.name)
    first, second = hosts
    _ip(
        "link",
        "add",
        DEVICE,
        "netns",
        first.name,
        "type",
        "veth",
        "peer",
        "name",
        DEVICE,
        "netns",
        second.name,
    )
    for host in hosts:
        host.connect()
    return hosts


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise TrialFailed(f"ip {' '.join(words)}: {done.stderr.strip()}")
