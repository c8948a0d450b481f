"""Verifies checkpoints when they are chosen; unless a certain one is meant, another replaces a damaged one.

Choosing reads all small files of a checkpoint before anything believes them, and in one process the large
ones too. Several processes share the large files (`share_of`) when rank 0 has chosen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import Choice, choose_checkpoint
from esm2mega.checkpoint.digests import check_sizes, is_large, read_digests, verify
from esm2mega.errors import DamagedError


@dataclass(frozen=True)
class Verification:
    """Says how far the checkpoints that are opened are verified.

    Attributes:
        with_large: Whether the files of tensors are compared when a checkpoint is chosen.
        known: Errors that were found already, by the checkpoint.
    """

    with_large: bool = True
    known: Mapping[Path, Exception] = field(default_factory=dict)

    def check(self, checkpoint: Path) -> None:
        """Compare the files of a checkpoint with their digests; say so if it has none.

        Raises:
            DamagedError: A file differs or is missing.
            MachineError: A file cannot be read.
        """
        if checkpoint in self.known:
            raise self.known[checkpoint]
        layout.check_state(checkpoint)
        entries = read_digests(checkpoint)
        if entries is None:
            _say_once(
                f"{checkpoint}: of an earlier version, which wrote no digests; its files are not verified"
            )
            return
        check_sizes(checkpoint, entries)
        verify(checkpoint, entries, [name for name in entries if self.with_large or not is_large(name)])


ALL_OF_IT = Verification()
"""Verifies every file in this process, as a command of one process does."""


def choose_good(named: str | Path, resuming: bool = False, verification: Verification = ALL_OF_IT) -> Choice:
    """Find the checkpoint that a name means, as `choose_checkpoint` does, and verify it; nothing is written.

    If the name means the newest or the best one of a run, whichever that is, and it is damaged, the next one
    is taken, which is said. One that its run removes meanwhile is none any more.

    Args:
        named: As for `choose_checkpoint`.
        resuming: As for `choose_checkpoint`.
        verification: How far the checkpoint is verified.

    Raises:
        UserError: There is none.
        DamagedError: The one that is meant, or the last one that is left, is damaged.
        MachineError: A file cannot be read, which is no reason to take another one.
    """
    passed: list[Path] = []
    while True:
        choice = choose_checkpoint(named, resuming, passed)
        try:
            verification.check(choice.path)
        except DamagedError as error:
            if choice.is_exact:
                raise
            if layout.is_complete(choice.path):
                line = f"{error.damage}; {choice.path.name} is passed over"
                print(f"esm2mega: {line}", file=sys.stderr, flush=True)
            passed.append(choice.path)
        else:
            return choice


def share_of(checkpoint: Path, rank: int, num_ranks: int) -> None:
    """Compare those files of tensors with their digests that fall to one of several processes.

    Raises:
        DamagedError: A file differs or is missing.
        MachineError: A file cannot be read.
    """
    entries = read_digests(checkpoint) or {}

    def size(name: str) -> Any:
        return entries[name]["bytes"]

    large = sorted((name for name in entries if is_large(name)), key=size, reverse=True)
    verify(checkpoint, entries, large[rank::num_ranks])


def set_aside(checkpoint: Path, error: DamagedError) -> None:
    """Rename a damaged checkpoint, as rank 0 of the run that owns it does under its lock, and say so."""
    aside = layout.set_aside(checkpoint)
    print(f"esm2mega: {error.damage}; {checkpoint.name} is now {aside}", file=sys.stderr, flush=True)


@functools.cache  # a checkpoint may be opened several times, as the base of adapters and as itself
def _say_once(line: str) -> None:
    print(f"esm2mega: {line}", file=sys.stderr, flush=True)
