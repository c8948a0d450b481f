"""Defines the errors that end a command with one line for the user and a fixed exit code."""

from __future__ import annotations


class UserError(Exception):
    """Reports bad input or configuration in one line: value, rule, place and cure. Exit code 2."""

    exit_code = 2


class MachineError(UserError):
    """Reports that the machine failed (full disk, lost process, refused memory). Exit code 1."""

    exit_code = 1


class StoppedBySignal(Exception):
    """Reports that a signal stopped the run and the state was saved. Exit code 75 (EX_TEMPFAIL: requeue)."""

    exit_code = 75
