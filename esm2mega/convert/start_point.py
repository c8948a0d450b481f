"""Opens a checkpoint once, so that all later steps mean the same configuration, head and weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.auxiliary import read_auxiliary
from esm2mega.checkpoint.digests import read_digests
from esm2mega.checkpoint.fallback import ALL_OF_IT, Verification, choose_good, share_of
from esm2mega.config.hub import cached, how_to_fetch
from esm2mega.config.load import values_of
from esm2mega.config.schema import FinetuneConfig, Run, TaskConfig
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.formats import esm2mega as own_format
from esm2mega.convert.formats.registry import detect, find_format, read_weights
from esm2mega.convert.heads.contact_head import WEIGHT, is_regression
from esm2mega.convert.lazy_weights import HeadDescription, Weights
from esm2mega.convert.unknown import refuse_foreign
from esm2mega.errors import UserError
from esm2mega.parallel import rendezvous
from esm2mega.parallel.errors import first_error, on_one_rank

OWN = "esm2mega"
"""This is the name of the package's own format."""


@dataclass
class StartPoint:
    """Holds what is known of a checkpoint in any format, as it was when it was opened.

    Rank 0 opens it and sends it to the other ranks (`esm2mega.parallel.errors.on_one_rank`), so that all of
    them use the same files, whatever appears beside these later. The tensors are not sent; each rank reads
    those that it needs.

    Attributes:
        path: File or directory; for a run, the ``step_XXXXXXXX`` directory that was meant of it.
        format: Name of the format, as in `esm2mega convert`.
        run: Configuration of the run that wrote it; for other formats, what their files say and defaults.
        head: ``lm`` for the masked-language-model head, the head of a task, or None for a bare encoder.
        has_contact_head: Whether a contact head lies beside the model.
        state: Content of ``train_state.json``; empty for other formats.
        base: The weights under its adapters, once `esm2mega.lora.base.with_base` has opened them.
        is_resumed: Whether training resumes from it with its optimizer and its place in the data, rather than
            starts from its weights alone.
        is_verified: Whether no file of tensors is left to compare with its digest.
        is_partial: Whether a part of the model is enough; never so in the format of this package, where
            `esm2mega.checkpoint.store.load_weights` decides.
    """

    path: Path
    format: str
    run: Run
    head: Literal["lm"] | HeadDescription | None
    has_contact_head: bool
    state: Mapping[str, Any] = field(default_factory=dict)
    base: StartPoint | None = None
    is_resumed: bool = False
    is_verified: bool = False
    is_partial: bool = False
    _weights: Weights | None = field(default=None, repr=False, compare=False)

    @property
    def is_own(self) -> bool:
        """Tell whether the checkpoint is in the format of this package."""
        return self.format == OWN

    @property
    def task(self) -> HeadDescription | None:
        """Return the head if it is that of a task, else None."""
        return self.head if isinstance(self.head, HeadDescription) else None

    @property
    def weights(self) -> Weights:
        """Return all tensors, which are opened on the first use in this process and read when asked for.

        Raises:
            UserError: The checkpoint holds adapters, or its files have become unreadable.
        """
        if self._weights is None:
            self._weights = _weights_of(self)
        return self._weights

    def auxiliary(self) -> dict[str, Tensor]:
        """Return the tensors that are kept beside the model, such as the contact head, by name."""
        if self.is_own:
            return read_auxiliary(self.path)
        weights = self.weights
        is_beside = own_format.is_auxiliary(weights.description)
        return {name: weights.read(name).clone() for name in weights.infos if is_beside(name)}

    def check_whole(self) -> None:
        """Raise `UserError` if the checkpoint holds adapters without the weights under them."""
        own_format.refuse_adapters(self.path, self.state)

    def release(self) -> None:
        """Close the files of the weights and release the tensors that they keep in memory."""
        self._weights = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay with the process that opened them.
        return {**vars(self), "_weights": None}


def find_source(
    named: str | Path, format_name: str | None = None, verification: Verification = ALL_OF_IT
) -> tuple[SourceFiles, str]:
    """Find the files that a name means, in this process alone; say which checkpoint of a run it is.

    Args:
        named: File or directory; or a run, as for `esm2mega.checkpoint.choice.choose_checkpoint`.
        format_name: Its format; None to detect it.
        verification: How far a checkpoint of this package is verified.

    Returns:
        The files and the format.

    Raises:
        UserError: There are none, or they are in no known format.
    """
    source = SourceFiles(_located(named))
    if format_name not in (None, OWN) and not source.path.exists():
        cure = how_to_fetch(named)
        raise UserError(f"{named}: no such file or directory{'; ' if cure else ''}{cure or ''}")
    if format_name is None:
        # What does not exist as it is written may name a checkpoint of a run.
        format_name = detect(source) if source.path.exists() else OWN
    if format_name == OWN:
        source = SourceFiles(_chosen(named, False, verification))
    return source, format_name


def _located(named: str | Path) -> Path:
    """Return the path that a name means: itself, or the copy in the local cache of the Hub, which is said."""
    if (found := cached(named)) is None:
        return Path(named)
    print(f"esm2mega: {named}: taken from the cache of the Hub, {found}", file=sys.stderr, flush=True)
    return found


def read_start(path: str | Path, verification: Verification = ALL_OF_IT, partial: bool = False) -> StartPoint:
    """Open a checkpoint in any format, in this process alone.

    Args:
        path: File or directory; or a run, as for `esm2mega.checkpoint.choice.choose_checkpoint`.
        verification: How far a checkpoint of this package is verified.
        partial: Whether a part of a model in another format is enough.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    source, found = find_source(path, None, verification)
    if found == OWN:
        return _read_own(source.path, verification)
    weights = read_weights(source, found, partial=partial)
    description = weights.description
    # What is stored in fp16 is computed in fp32.
    run = own_format.run_of(replace(description, dtype=own_format.default_dtype(description.dtype)))
    return StartPoint(
        *(source.path, found, run, description.head, weights.has_contact_head),
        is_verified=True,
        is_partial=partial,
        _weights=weights,
    )


def open_checkpoint(checkpoint: str | Path | StartPoint, verify: bool = True) -> StartPoint:
    """Open a checkpoint of this package on rank 0 for all ranks, which call this together.

    Args:
        checkpoint: A path as for `read_checkpoint`; a checkpoint that is open already is returned as it is.
        verify: Whether the files of tensors are verified: `checkpoint.verify`.
    """
    if isinstance(checkpoint, StartPoint):
        return checkpoint
    return open_together(lambda how: read_checkpoint(checkpoint, verification=how), verify)


Opened = TypeVar("Opened", StartPoint, StartPoint | None)


def open_together(
    read: Callable[[Verification], Opened], verify: bool, timeout: timedelta = rendezvous.TIMEOUT
) -> Opened:
    """Open a checkpoint on rank 0 for all ranks, which call this together and share its verification.

    Each rank reads its share of the files of tensors. If that finds an error, rank 0 opens again, knowing it,
    so that it takes another checkpoint for a damaged one where the name allows that.

    Args:
        read: Opens the checkpoint in the process of rank 0, verified so far; may find none.
        verify: Whether the files of tensors are verified: `checkpoint.verify`.
        timeout: Longest wait for other ranks, see `on_one_rank`.

    Returns:
        What `read` opened, on every rank.

    Raises:
        DamagedError: A file of a checkpoint that was named exactly, or of the last one left, is damaged.
        MachineError: A file cannot be read.
    """
    known: dict[Path, Exception] = {}

    def opened() -> Opened:
        start = read(Verification(False, known))
        for unverified in () if verify else _unverified(start):
            line = f"{unverified.path}: its tensors are not verified (checkpoint.verify=false)"
            print(f"esm2mega: {line}", file=sys.stderr, flush=True)
        return start

    while True:
        start = on_one_rank(opened, timeout)
        for unverified in _unverified(start):
            if verify and (error := first_error(functools.partial(share_of, unverified.path), timeout)):
                known[unverified.path] = error
                break
            unverified.is_verified = True
        else:
            return start


def _unverified(start: StartPoint | None) -> list[StartPoint]:
    """Return those of a checkpoint and the base of its adapters of which not all files are verified."""
    both = () if start is None else (start, start.base)
    return [opened for opened in both if opened is not None and not opened.is_verified]


def asks_to_verify(overrides: Sequence[str], config: str | None = None) -> bool:
    """Return `checkpoint.verify` as a command gives it that reads a checkpoint, whose own value is not asked.

    Args:
        overrides: ``key=value`` settings of the command.
        config: Its configuration file; None for none.
    """
    (value,) = values_of(("checkpoint.verify",), config, overrides)
    return value is not False


def read_checkpoint(
    checkpoint: str | Path, resuming: bool = False, verification: Verification = ALL_OF_IT
) -> StartPoint:
    """Open a checkpoint of this package, in this process alone.

    Args:
        checkpoint: As for `esm2mega.checkpoint.choice.choose_checkpoint`.
        resuming: Whether training is to go on from it, so that a run means its last one.
        verification: How far it is verified.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    source = SourceFiles(_located(checkpoint))
    if source.path.exists() and (found := find_format(source)) != OWN:
        refuse_foreign(source.path, found)
    return _read_own(_chosen(checkpoint, resuming, verification), verification)


def _chosen(named: str | Path, resuming: bool, verification: Verification) -> Path:
    """Return the checkpoint that a name means, verified, and say which one of a run it is."""
    choice = choose_good(named, resuming, verification)
    if choice.words is not None:
        print(f"esm2mega: {choice.words}", file=sys.stderr, flush=True)
    return choice.path


def _read_own(directory: Path, verification: Verification) -> StartPoint:
    run, state = layout.read_config(directory), layout.read_state(directory)
    head = own_format.task_head(run.task, state, {}, directory)
    has_contact_head = WEIGHT in read_auxiliary(directory)
    is_verified = verification.with_large or read_digests(directory) is None
    return StartPoint(directory, OWN, run, head or "lm", has_contact_head, state, is_verified=is_verified)


def _weights_of(start: StartPoint) -> Weights:
    if not start.is_own:
        return read_weights(SourceFiles(start.path), start.format, partial=start.is_partial)
    weights = own_format.read_checkpoint(start.path, start.run, start.state)
    weights.origin |= {"format": OWN, "path": str(start.path)}
    return weights


def starts_with_contact_head(start: StartPoint, task: TaskConfig, finetune: FinetuneConfig) -> bool:
    """Tell whether the head of the task starts as the contact head of a model without a task.

    Raises:
        UserError: It should, but that model has no contact head.
    """
    if not finetune.load_head or not is_regression(task) or start.task is not None:
        return False
    if not start.has_contact_head:
        raise UserError(f"init_from={start.path}: has no contact head; set finetune.load_head=false")
    return True
