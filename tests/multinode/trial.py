"""Trains on two hosts with torchrun, loses one of them, and goes on in two ways.

Network namespaces are the hosts, `examples/pretrain_torchrun_multinode.sh` is what runs on them. Each host is
lost once: the one that holds the rendezvous with its cable pulled out before its processes die, as when its
power fails, and the other one by SIGKILL to all its processes. The run then goes on, from copies of what is
left, on the other host alone with half the processes, and on both after a repair; the ends are compared with
that of an unbroken run. In fp64, where another layout is another order of the same sums.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.quickstart.simulate import FamilySpec, simulate_families
from tests.multinode.hosts import Host, make_hosts
from tests.namespaces import TrialFailed, say
from tests.same_run import ROUNDING, compare

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "pretrain_torchrun_multinode.sh"
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
PROCESSES = 2
STEPS = 30
SAVE_EVERY = 5
LOST_AFTER = 12
SETTINGS = (
    "model.precision=fp64",
    "data.max_seq_length=128",
    "train.micro_batch_tokens=512",
    "train.global_batch_tokens=2048",
    f"train.max_steps={STEPS}",
    "train.log_every=1",
    "train.eval_every=10",
    "schedule.warmup_steps=5",
    f"checkpoint.save_every={SAVE_EVERY}",
    # How long a process waits for a host that has fallen silent.
    "parallel.timeout_minutes=0.5",
)
PATIENCE = 400
"""Seconds that a run may take on a busy machine of two cores."""


@dataclass(frozen=True)
class Training:
    """One run on hosts that share a disk."""

    folder: Path
    name: str

    @property
    def run_dir(self) -> Path:
        return self.folder / self.name

    def start(self, hosts: list[Host]) -> None:
        """Start it on these hosts; the first one holds the rendezvous."""
        for number, host in enumerate(hosts):
            environment = {
                **os.environ,
                "PYTHON": sys.executable,
                "PYTHONPATH": str(REPOSITORY),
                "PYTHONWARNINGS": "ignore",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "NNODES": str(len(hosts)),
                "NODE_RANK": str(number),
                "MASTER_ADDR": hosts[0].name,
                "NPROC_PER_NODE": str(PROCESSES),
                "TP": str(PROCESSES),
                "STORE": str(self.folder / "store"),
                "CONFIG": "pretrain_esm2_tiny",
                "RUN_DIR": str(self.run_dir),
            }
            host.start(["bash", str(SCRIPT), *SETTINGS], self._output(host), environment)

    def finish(self, hosts: list[Host]) -> float:
        """Wait until it is done on all hosts; return the seconds that this took."""
        began = time.monotonic()
        for host in hosts:
            if code := host.wait(PATIENCE):
                raise TrialFailed(f"{self.name}: {host.name} ended with {code}\n{self.tail(host)}")
        return time.monotonic() - began

    def wait_for_step(self, step: int, hosts: list[Host]) -> None:
        """Wait until the log has a step."""
        deadline = time.monotonic() + PATIENCE
        while self.last_step() < step:
            if time.monotonic() > deadline or any(host.poll() is not None for host in hosts):
                raise TrialFailed(f"{self.name}: did not reach step {step}\n{self.tail(hosts[0])}")
            time.sleep(0.05)

    def last_step(self) -> int:
        """Return the number of training records that are written."""
        log = self.run_dir / "log.jsonl"
        return log.read_text().count('"kind": "train"') if log.exists() else 0

    def checkpoint(self) -> str:
        """Return the name of the newest complete checkpoint."""
        return max(path.parent.name for path in self.run_dir.glob("checkpoints/step_*/COMPLETE"))

    def tail(self, host: Host) -> str:
        """Return the end of what a host printed."""
        return "\n".join(self._output(host).read_text().splitlines()[-25:])

    def errors(self, host: Host) -> list[str]:
        """Return the lines by which esm2mega reported an error on a host."""
        return [line for line in self._output(host).read_text().splitlines() if line.startswith("esm2mega: ")]

    def copy(self, name: str) -> Training:
        """Return a copy under another name."""
        shutil.copytree(self.run_dir, self.folder / name)
        return Training(self.folder, name)

    def _output(self, host: Host) -> Path:
        return self.folder / f"{self.name}.{host.name}.log"


def inside(folder: Path) -> None:
    """Make the hosts, and show what happens to a run when one of them is lost."""
    hosts = make_hosts(folder / "hosts", ADDRESSES)
    spec = FamilySpec(median_length=90, length_sigma=0.3, min_length=40, max_length=160)
    simulate_families(folder / "proteins.fasta", n_families=12, members=20, spec=spec)
    prepare_fasta([folder / "proteins.fasta"], folder / "store", valid_size=20)

    unbroken = Training(folder, "unbroken")
    unbroken.start(hosts)
    seconds = unbroken.finish(hosts)
    say(f"two hosts, {PROCESSES} processes each: {STEPS} steps in {seconds:.0f} s")

    first, second = hosts
    lose(unbroken, first, survivor=second, cable=True)
    lose(unbroken, second, survivor=first, cable=False)
    say("all runs ended as they should")


def lose(unbroken: Training, lost: Host, survivor: Host, cable: bool) -> None:
    """Train until a host is lost, then go on without it, and with it."""
    folder = unbroken.folder
    broken = Training(folder, f"without-{lost.name}")
    hosts = [lost, survivor] if cable else [survivor, lost]
    broken.start(hosts)
    broken.wait_for_step(LOST_AFTER, hosts)
    if cable:
        lost.set_link("down")
    lost.kill()
    how = "its cable pulled out, then SIGKILL" if cable else "SIGKILL to all its processes"
    began = time.monotonic()
    code = survivor.wait(PATIENCE)
    if not code:
        raise TrialFailed(f"{broken.name}: {survivor.name} ended with 0\n{broken.tail(survivor)}")
    say(
        f"{lost.name} lost in step {broken.last_step()} ({how}): {survivor.name} ended after "
        f"{time.monotonic() - began:.0f} s with exit code {code}; left is {broken.checkpoint()}"
    )
    for line in broken.errors(survivor):
        say(f"  it said: {line}")

    alone = broken.copy(f"{broken.name}-alone")
    alone.start([survivor])
    alone.finish([survivor])
    end = compare(unbroken.run_dir, alone.run_dir, STEPS, ROUNDING)
    say(f"  went on alone, with half the processes: {end}")

    if cable:
        lost.set_link("up")
    together = broken.copy(f"{broken.name}-repaired")
    together.start(hosts)
    together.finish(hosts)
    say(f"  went on with both after a repair: {compare(unbroken.run_dir, together.run_dir, STEPS)}")
