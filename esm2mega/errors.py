"""Defines the errors that end a command with one line for the user and a fixed exit code."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Reports bad input or configuration in one line: value, rule, place and cure. Exit code 2."""

    exit_code = 2


class DamagedError(UserError):
    """Reports that a file which this package wrote has other content than was written. Exit code 2.

    Attributes:
        path: The damaged file.
    """

    def __init__(self, path: str | Path, damage: str, cure: str = "") -> None:
        """Keep the file beside the line for the user.

        Args:
            path: The damaged file.
            damage: What is wrong with it, as the predicate of a sentence about it.
            cure: What the user can do.
        """
        # All go to `Exception`, so that the error can be sent to other ranks as a pickle.
        super().__init__(path, damage, cure)
        self.path = Path(path)

    @property
    def damage(self) -> str:
        """Return what is wrong with which file, without the cure."""
        return f"{self.path}: {self.args[1]}"

    def __str__(self) -> str:
        return f"{self.damage}; {self.args[2]}" if self.args[2] else self.damage


class MachineError(UserError):
    """Reports that the machine failed (full disk, lost process, refused memory). Exit code 1."""

    exit_code = 1


class LostWorkerError(MachineError):
    """Reports that a process of this rank alone was lost; the other ranks know nothing of it. Exit code 1."""


class StoppedBySignal(Exception):
    """Reports that a signal stopped the run and the state was saved. Exit code 75 (EX_TEMPFAIL: requeue).

    Attributes:
        reason: What stopped it, for a reader.
    """

    exit_code = 75

    def __init__(self, reason: str, rest: str) -> None:
        """Make the message of the reason, and of what is said about the run."""
        super().__init__(f"stopped by {reason}{rest}")
        self.reason = reason
