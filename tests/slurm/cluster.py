"""A Slurm of one node with everything in one directory: its key, its configuration, its state, its logs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from tests.namespaces import TrialFailed, name_hosts

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
"""Debian's packages of the commands that are needed."""

NODE, ADDRESS = "node1", "10.77.0.1"
CPUS = 4
"""What the node claims to have, so that two tasks have two CPUs each on any machine."""

# A job that is requeued is eligible again when its old credentials have expired.
_CONFIGURATION = """\
ClusterName=trial
SlurmctldHost={node}
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
MinJobAge=7200
NodeName={node} CPUs={cpus} State=UNKNOWN
PartitionName=trial Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


class Cluster:
    """The running Slurm; its daemons end with the process namespace that they are started in."""

    def __init__(self, folder: Path) -> None:
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(parents=True)
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> str:
        """Start the daemons, and return Slurm's version when the node takes jobs."""
        # Slurm asks for addresses of networks other than the loopback, which are looked for on any device.
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
        subprocess.run(["hostname", NODE], check=True)
        name_hosts(self.folder, {NODE: ADDRESS})

        key, munge = self.folder / "munge" / "key", self.folder / "munge"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # munged refuses a socket in a directory that others cannot reach.
        munge.chmod(0o755)
        files = ("socket", "pid-file", "log-file", "seed-file")
        options = [f"--{name}={munge / name.removesuffix('-file')}" for name in files]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)

        configuration = self.folder / "slurm.conf"
        configuration.write_text(_CONFIGURATION.format(folder=self.folder, node=NODE, cpus=CPUS))
        # For the daemons, the commands and the jobs: a Slurm that this machine belongs to is not asked.
        for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SRUN"))]:
            del os.environ[name]
        os.environ["SLURM_CONF"] = str(configuration)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        deadline = time.monotonic() + 60
        while _output("sinfo", "--noheader", "--format=%T") != "idle":
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                raise TrialFailed(f"Slurm does not start\n{self.logs()}")
            time.sleep(0.2)
        return _output("sinfo", "--version")

    def submit(self, script: Path, *options: str, cwd: Path, variables: Mapping[str, str]) -> str:
        """Submit a script, and return the number of the job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)],
            cwd=cwd,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise TrialFailed(f"sbatch {script.name}: {done.stderr.strip()}")
        return done.stdout.strip()

    def jobs(self, number: str) -> list[dict[str, str]]:
        """Return what Slurm says of a job; of an array, of each of its tasks."""
        lines = _output("scontrol", "--oneliner", "show", "job", number).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def wait(self, number: str, timeout: float) -> list[dict[str, str]]:
        """Wait until a job, or an array as a whole, has ended; return what Slurm says of it."""
        deadline = time.monotonic() + timeout
        while any(job["JobState"] not in ENDED for job in self.jobs(number)):
            if time.monotonic() > deadline:
                raise TrialFailed(f"job {number} has not ended in {timeout:.0f} s\n{self.logs()}")
            time.sleep(0.5)
        return self.jobs(number)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        files = [self.folder / f"{name}.log" for name in ("slurmctld", "slurmd")]
        found = [path for path in files if path.exists()]
        return "\n".join(
            f"{path.name}: {line}" for path in found for line in path.read_text().splitlines()[-8:]
        )

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            self._daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
