"""Writes what a suite ran as a shell script that a person can start."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esm2mega.autoeval.tasks import PROBE

_PREPARE = "prepare"
_HEAD = """\
#!/usr/bin/env bash
# What autoeval ran. To do it again, copy this file and the folder data beside it into an empty folder, and
# start it there. It writes the folder work. It reads the models, and from data the tables, wild types and
# random weights that autoeval wrote; of the published files only those of ProteinGym.
#
# LAUNCH starts the commands that share their work among processes [{launch}].
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
if [[ -e work ]]; then
  echo "$PWD/work exists; copy commands.sh and data into an empty folder, and start it there" >&2
  exit 2
fi
read -r -a launch <<<"${{LAUNCH:-{launch}}}"
"""


@dataclass(frozen=True)
class TaskScript:
    """Holds what the script says of a task.

    Attributes:
        name: Full name of the task.
        limited: Most proteins of each split; None for all.
        first_residues: How many residues of each protein are kept; None for all.
        commands: The commands, to be run in the folder of results.
    """

    name: str
    limited: Mapping[str, int] | None
    first_residues: int | None
    commands: Sequence[Sequence[str]]


def shell_line(command: Sequence[str]) -> str:
    """Return a command as a shell takes it."""
    return shlex.join(["esm2mega", *command])


def script_of(tasks: Sequence[TaskScript], seed: int, num_processes: int) -> str:
    """Return the script.

    Args:
        tasks: The tasks.
        seed: Seed that chose the proteins where a task has fewer than were published.
        num_processes: Number of processes that the suite ran with.
    """
    torchrun = f"torchrun --standalone --nproc-per-node {num_processes} -m esm2mega"
    parts = [_HEAD.format(launch="esm2mega" if num_processes == 1 else torchrun)]
    for task in tasks:
        lines = dict.fromkeys(_line(command) for command in task.commands if command[0] != _PREPARE)
        made = [f"#   {shell_line(command)}" for command in task.commands if command[0] == _PREPARE]
        about = [f"# Its tables are {_kept(task, seed)} of", *made] if made else []
        parts.append("\n".join([f"# {task.name}", *about, *lines, ""]))
    return "\n".join(parts)


def _line(command: Sequence[str]) -> str:
    """Return the line of a command; a probe is for one process."""
    return shell_line(command) if command[0] == PROBE else f'"${{launch[@]}}" {shlex.join(command)}'


def _kept(task: TaskScript, seed: int) -> str:
    proteins = "all proteins"
    if task.limited is not None:
        most = ", ".join(f"{number:,} {split}" for split, number in task.limited.items())
        proteins = f"at most {most} proteins, chosen by the seed {seed},"
    residues = "" if task.first_residues is None else f"the first {task.first_residues} residues of "
    return f"{residues}{proteins}"
