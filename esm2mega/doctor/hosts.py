"""Compares the hosts of a job, when the doctor is started on several: clocks, network, and shared files.

One process speaks for each host, the others leave. Everything that is exchanged goes through the rendezvous
store of the job, so that nothing depends on what is checked.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Any

import filelock
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from esm2mega.doctor.directory import LOCK_CURE, PREFIX, try_lock, write_synced
from esm2mega.doctor.finding import FAILED, OK, WARNING, Finding
from esm2mega.files import real_path
from esm2mega.parallel import rendezvous

MEETING = timedelta(minutes=1)
"""Limits how long processes wait for each other at the start."""

CHECKING = timedelta(minutes=10)
"""Limits how long a host may take for its own checks."""

SKEW_WARNING, SKEW_FAILED = 1.0, 10.0
"""Are seconds between clocks. The rendezvous of torchrun takes a host for dead that is 15 s behind."""

PINGS = 5
VISIBLE_SECONDS = 30.0
"""Limits how long another host may take to see what is written; NFS remembers directories that long."""

SLOW_SECONDS = 5.0


class Hosts:
    """Holds the processes that speak for the hosts of a job; the first of them is rank 0.

    Attributes:
        rank: The rank of this process.
        names: The name of each host, by the rank that speaks for it.
        world_size: The number of all processes.
    """

    def __init__(self, timeout: timedelta = MEETING) -> None:
        """Meet the other processes of the job.

        Raises:
            RuntimeError: They did not come in time.
            UserError: The address of rank 0 is not known.
        """
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = rendezvous.meet(timeout)
        number = rendezvous.next_number(store, "doctor", self.rank)
        self.store: Store = PrefixStore(f"esm2mega/doctor_{number}", store)
        # torchrun's number of the host tells apart hosts that have one name.
        self._send(f"host_{self.rank}", [socket.gethostname(), os.environ.get("GROUP_RANK", "")])
        if self.rank == 0:
            self._send("names", list(self._speakers().items()))
        self.names: dict[int, str] = dict(self._receive("names"))
        self.store.set_timeout(CHECKING)

    def _speakers(self) -> dict[int, str]:
        """Return the name of each host by the lowest rank on it."""
        found: dict[tuple[str, str], int] = {}
        for rank in range(self.world_size):
            name, group = self._receive(f"host_{rank}")
            found.setdefault((name, group), rank)
        same_name = len({name for name, _ in found}) < len(found)
        return {rank: f"{name}/{group}" if same_name else name for (name, group), rank in found.items()}

    @property
    def others(self) -> list[int]:
        """Return the ranks that speak for the hosts besides that of rank 0."""
        return sorted(self.names)[1:]

    def leave(self) -> None:
        """End the meeting; rank 0, which may host the store, is the last to go."""
        self.store.set(f"left_{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"left_{rank}" for rank in range(self.world_size)], CHECKING)
        rendezvous.leave()

    def collect(self, findings: Sequence[Finding]) -> list[Finding]:
        """Return on rank 0 the findings of all hosts, with the name of the host where they differ."""
        if self.rank != 0:
            self._send(f"findings_{self.rank}", [astuple(finding) for finding in findings])
            return []
        of_host = {0: list(findings)}
        for rank in self.others:
            of_host[rank] = [Finding(*line) for line in self._receive(f"findings_{rank}")]
        merged: list[Finding] = []
        for rank, lines in of_host.items():
            for line in lines:
                if all(line in theirs for theirs in of_host.values()):
                    if rank == 0:
                        merged.append(line)
                else:
                    merged.append(Finding(line.state, f"{self.names[rank]}: {line.what}", line.cure))
        return merged

    def compare(self, directory: Path) -> list[Finding]:
        """Compare the hosts with that of rank 0, and return the findings there; all speakers call this."""
        if not self.others:
            return [Finding(OK, f"{self.world_size} processes on one host: no clocks to compare")]
        return [*self._clocks(), *self._network(), *self._files(directory)]

    def _clocks(self) -> Iterator[Finding]:
        """Measure the clock of each host against that of rank 0, as NTP does: by question and answer."""
        if self.rank != 0:
            self.store.get(f"clock_{self.rank}")
            best = (float("inf"), 0.0)
            for ping in range(PINGS):
                asked = now()
                self.store.set(f"ping_{self.rank}_{ping}", "")
                theirs = self._receive(f"pong_{self.rank}_{ping}")
                answered = now()
                # What the answer took bounds the error; the quickest one is the best.
                best = min(best, (answered - asked, (asked + answered) / 2 - theirs))
            self._send(f"skew_{self.rank}", best)
            return
        for rank in self.others:
            self.store.set(f"clock_{rank}", "")
            for ping in range(PINGS):
                self.store.get(f"ping_{rank}_{ping}")
                self._send(f"pong_{rank}_{ping}", now())
            took, skew = self._receive(f"skew_{rank}")
            side = "ahead of" if skew > 0 else "behind"
            what = (
                f"clock of {self.names[rank]}: {abs(skew):.3f} s {side} {self.names[0]}, to {took / 2:.3f} s"
            )
            state = OK if abs(skew) < SKEW_WARNING else WARNING if abs(skew) < SKEW_FAILED else FAILED
            yield Finding(
                state, what, "" if state == OK else "start a time service, such as chrony, on all hosts"
            )

    def _network(self) -> Iterator[Finding]:
        """All-reduce over gloo between the speakers of all hosts."""
        speakers = sorted(self.names)
        what = f"gloo all-reduce between {len(speakers)} hosts"
        cure = "open all ports between the hosts, or set GLOO_SOCKET_IFNAME to the interface between them"
        try:
            dist.init_process_group(
                "gloo",
                store=PrefixStore("gloo", self.store),
                rank=speakers.index(self.rank),
                world_size=len(speakers),
                timeout=MEETING,
            )
            try:
                value = torch.tensor([self.rank + 1.0])
                dist.all_reduce(value)  # over the speakers; every one has the sum
            finally:
                dist.destroy_process_group()
        except RuntimeError as error:
            yield Finding(FAILED, f"{what}: {str(error).partition(chr(10))[0]}", cure)
            return
        if value.item() != sum(speakers) + len(speakers):
            yield Finding(FAILED, f"{what}: a wrong sum", cure)
        else:
            yield Finding(OK, what)

    def _files(self, directory: Path) -> Iterator[Finding]:
        """Let rank 0 rename a directory and hold a lock in `directory`, and the other hosts look for both."""
        if self.rank != 0:
            name, payload = self._receive("scratch")
            if name:
                self._send(f"files_{self.rank}", _look(directory / name, payload))
            return
        try:
            with (
                tempfile.TemporaryDirectory(prefix=PREFIX, dir=directory) as scratch,
                filelock.FileLock(Path(scratch, "lock"), timeout=0),
            ):
                payload = os.urandom(32).hex()
                Path(scratch, "step.tmp").mkdir()
                write_synced(Path(scratch, "step.tmp", "data"), payload.encode())
                Path(scratch, "step.tmp").rename(Path(scratch, "step"))
                self._send("scratch", [Path(scratch).name, payload])
                answers = {rank: self._receive(f"files_{rank}") for rank in self.others}
        except (OSError, NotImplementedError):
            # What this host cannot do there is among its own findings.
            self._send("scratch", ["", ""])
            return
        for rank, (seconds, lock) in answers.items():
            yield self._shared(directory, self.names[rank], seconds, lock)

    def _shared(self, directory: Path, host: str, seconds: float | None, lock: str) -> Finding:
        what = f"directory {real_path(directory)} on {host}"
        if seconds is None:
            return Finding(
                FAILED,
                f"{what}: what {self.names[0]} renames is not there within {VISIBLE_SECONDS:.0f} s",
                "name a directory of a file system that all hosts share",
            )
        if lock != "held":
            return Finding(FAILED, f"{what}: a lock that {self.names[0]} holds is {lock}", LOCK_CURE)
        if seconds > SLOW_SECONDS:
            return Finding(
                WARNING,
                f"{what}: what {self.names[0]} renames is seen after {seconds:.0f} s",
                "mount it with shorter caching (NFS: actimeo, lookupcache=positive)",
            )
        return Finding(OK, f"{what}: renames and locks of {self.names[0]} are seen")

    def _send(self, key: str, value: object) -> None:
        self.store.set(key, json.dumps(value))

    def _receive(self, key: str) -> Any:
        return json.loads(self.store.get(key))


def now() -> float:
    """Return the time of this host's clock in seconds."""
    return time.time()


def _look(scratch: Path, payload: str) -> tuple[float | None, str]:
    """Wait for the renamed directory, try the lock, and return the seconds waited, or None, and its state."""
    started = time.monotonic()
    while True:
        waited = time.monotonic() - started
        try:
            if (scratch / "step" / "data").read_text() == payload and not (scratch / "step.tmp").exists():
                return waited, try_lock(scratch / "lock")
        except OSError:
            pass
        if waited > VISIBLE_SECONDS:
            return None, ""
        time.sleep(0.1)
