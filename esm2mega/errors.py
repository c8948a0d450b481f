"""The errors that end a command with one line for the user and a fixed exit code."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or configuration: one line with the value, the rule, the place and the cure. Exit code 2."""

    exit_code = 2


class MachineError(UserError):
    """The machine failed (full disk, lost process, refused memory), not the user's input. Exit code 1."""

    exit_code = 1


class StoppedBySignal(Exception):
    """A signal asked the run to stop and the state was saved. Exit code 75 (EX_TEMPFAIL: requeue)."""

    exit_code = 75
