"""Finds the weights that adapters belong to, and identifies them by a checksum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.fallback import ALL_OF_IT, Verification
from esm2mega.checkpoint.tensors import combined_sha256, tensor_sha256
from esm2mega.config.run_name import is_there, split_run
from esm2mega.config.schema import LoRAConfig
from esm2mega.convert.formats.esm2mega import is_auxiliary
from esm2mega.convert.name_table import CONTACT_HEAD
from esm2mega.convert.start_point import StartPoint, open_together, read_start
from esm2mega.errors import UserError
from esm2mega.files import real_path, refuse_stream

_SET_INIT_FROM = "say where it is with init_from=PATH"

MERGE_THEM = "make a whole model of them with `esm2mega lora merge CHECKPOINT --base PATH --out DIR`"
"""Is the cure where a command or function takes no `init_from`."""

_KEY = "base"
"""This key of ``train_state.json`` marks a checkpoint that holds no weights but those that were trained."""


@dataclass(frozen=True)
class Base:
    """Identifies the frozen weights under adapters by their path and a checksum.

    Attributes:
        path: Checkpoint with the weights, in any format.
        sha256: Checksum of all its weights by name; it is the same in every format that stores the same
            values and dtype.
        contact_sha256: The same of its contact head, which formats may leave out; None without one, and in
            checkpoints of earlier versions.
    """

    path: str
    sha256: str
    contact_sha256: str | None = None

    def as_state(self) -> dict[str, Any]:
        """Return the entry of ``train_state.json``."""
        return {_KEY: {name: value for name, value in asdict(self).items() if value is not None}}


def identify(base: StartPoint) -> Base:
    """Read all weights of a checkpoint in any format, and return what identifies them."""
    weights = base.weights
    is_beside = is_auxiliary(weights.description)

    def checksum(names: Iterable[str]) -> str:
        return combined_sha256((name, tensor_sha256(weights.read(name))) for name in sorted(names))

    contacts = [name for name in weights.infos if name.startswith(CONTACT_HEAD)]
    return Base(
        str(real_path(base.path)),
        checksum(name for name in weights.infos if not is_beside(name)),
        checksum(contacts) if contacts else None,
    )


def has_adapters(start: StartPoint) -> bool:
    """Tell whether a checkpoint holds adapters without the weights under them."""
    return _KEY in start.state


def with_base(
    start: StartPoint,
    given: str | None,
    opened: StartPoint | None = None,
    cure: str = _SET_INIT_FROM,
    verification: Verification = ALL_OF_IT,
) -> StartPoint:
    """Open the weights under the adapters of a checkpoint as well, in this process alone.

    Args:
        start: A checkpoint; a whole model is returned as it is.
        given: Where the user says that the base is: `init_from`; None for where it was in training.
        opened: The checkpoint that `given` names, if it has been opened already; it may be the base.
        cure: How the user can say where the base is, for errors.
        verification: How far the base is verified.

    Raises:
        UserError: The base is not there, or cannot be read, or holds adapters itself.
    """
    if not has_adapters(start) or start.base is not None:
        return start
    path = _find_base(start, given, cure)
    # `given` may name a run, of which is not chosen again.
    if opened is not None and real_path(path) in (real_path(opened.path), real_path(given or opened.path)):
        base = opened
    else:
        base = read_start(path, verification)
    base.check_whole()
    return replace(start, base=base)


def open_base(start: StartPoint, given: str | None, verify: bool = True) -> StartPoint:
    """Let rank 0 call `with_base` for all ranks, which call this function together."""
    if not has_adapters(start):
        return start
    return open_together(lambda how: with_base(start, given, verification=how), verify)


def read_with_base(
    path: str | Path,
    given: str | None = None,
    cure: str = _SET_INIT_FROM,
    verification: Verification = ALL_OF_IT,
) -> StartPoint:
    """Open a checkpoint as `read_start` does, and the weights under adapters as `with_base` does."""
    start = read_start(path, verification)
    return with_base(start, given, cure=cure, verification=verification)


def _find_base(start: StartPoint, given: str | None, cure: str) -> Path:
    """Return where the base of adapters is: where the user says, else at the recorded path.

    A run that the user names holds several checkpoints, of which the recorded one is meant if it is still
    among them: a training that resumes names the run that it began from, which has gone on since.
    """
    recorded = recorded_base(start).path
    if given is not None and is_there(given):
        run, which = split_run(given)
        inside = which is None and real_path(run) in real_path(recorded).parents
        return Path(recorded if inside and is_there(recorded) else given)
    if given is not None and Path(given) != Path(recorded):
        raise UserError(f"init_from={given} does not exist; name the base of {start.path}, or leave it out")
    if not is_there(recorded):
        raise UserError(f"{start.path}: holds adapters of {recorded}, which is not there any more; {cure}")
    refuse_stream(recorded, f"{start.path}: the base of its adapters, {recorded}")
    return Path(recorded)


def recorded_base(start: StartPoint) -> Base:
    """Return what a checkpoint of adapters records about its base."""
    entry = start.state.get(_KEY)
    if (
        not isinstance(entry, dict)
        or not {"path", "sha256"} <= set(entry) <= {field.name for field in fields(Base)}
        or not all(isinstance(value, str) for value in entry.values())
    ):
        raise UserError(
            f"{start.path}: not a checkpoint of adapters; give one that was trained with lora.rank"
        )
    return Base(**entry)


def check_base(start: StartPoint, found: Base) -> None:
    """Refuse weights other than those that the adapters were trained on."""
    recorded = recorded_base(start)
    if found.sha256 != recorded.sha256:
        raise UserError(
            f"{start.path}: its adapters belong to other weights than those of {found.path} (sha256 "
            f"{recorded.sha256[:12]}…, not {found.sha256[:12]}…); give the base that they were trained on"
        )
    contacts = recorded.contact_sha256, found.contact_sha256
    if None not in contacts and contacts[0] != contacts[1]:
        raise UserError(
            f"{start.path}: {found.path} has the weights that its adapters were trained on, but another "
            "contact head; give the base that they were trained on"
        )


def check_adapters(start: StartPoint, lora: LoRAConfig) -> None:
    """Refuse adapters that differ in form from those of the configuration; the dropout may differ.

    Raises:
        UserError: A key has another value; the message names it.
    """
    theirs = start.run.lora
    for key in ("rank", "alpha", "target_modules", "use_rslora", "use_dora", "bias"):
        if (value := getattr(theirs, key)) != (own := getattr(lora, key)):
            raise UserError(
                f"{start.path}: its adapters have lora.{key}={value}, the configuration says {own}; set "
                f"lora.{key}={'null' if value is None else value}"
            )
