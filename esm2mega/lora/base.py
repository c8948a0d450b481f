"""Knows the weights that adapters belong to: where they lie, and the checksum that identifies them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.tensors import combined_sha256, tensor_sha256
from esm2mega.config.schema import LoRAConfig
from esm2mega.convert.formats.esm2mega import is_auxiliary
from esm2mega.convert.start_point import StartPoint, read_start
from esm2mega.errors import UserError
from esm2mega.parallel.errors import on_one_rank

_KEY = "base"
"""Of ``train_state.json``: whoever has it holds no weights of its own but those that were trained."""


@dataclass(frozen=True)
class Base:
    """The frozen weights under adapters.

    Attributes:
        path: Checkpoint, in any format.
        sha256: Over all its weights by name, the same in every format that stores the same values and dtype.
    """

    path: str
    sha256: str

    def as_state(self) -> dict[str, Any]:
        """The entry of ``train_state.json``."""
        return {_KEY: asdict(self)}


def identify(base: StartPoint) -> Base:
    """Read all weights of a checkpoint in any format, and say which they are."""
    weights = base.weights
    is_beside = is_auxiliary(weights.description)
    names = sorted(name for name in weights.infos if not is_beside(name))
    return Base(
        str(base.path.resolve()), combined_sha256((name, tensor_sha256(weights.read(name))) for name in names)
    )


def has_adapters(start: StartPoint) -> bool:
    """Whether a checkpoint holds adapters without the weights under them."""
    return _KEY in start.state


def with_base(start: StartPoint, given: str | None, opened: StartPoint | None = None) -> StartPoint:
    """Open the weights under the adapters of a checkpoint too, in this process alone.

    Args:
        start: A checkpoint; a whole model is returned as it is.
        given: Where the base is, if it is no longer where it was in training: `init_from`.
        opened: The checkpoint that `given` names, if it has been opened; it may be the base.

    Raises:
        UserError: The base is in neither place, or cannot be read, or holds adapters itself.
    """
    if not has_adapters(start) or start.base is not None:
        return start
    path = _find_base(start, given)
    # `given` may be the directory of a run, which is not looked into again.
    if opened is not None and path.resolve() in (opened.path.resolve(), Path(given or opened.path).resolve()):
        base = opened
    else:
        base = read_start(path)
    base.check_whole()
    return replace(start, base=base)


def open_base(start: StartPoint, given: str | None) -> StartPoint:
    """`with_base` by rank 0, for all ranks; all of them call this together."""
    return on_one_rank(lambda: with_base(start, given)) if has_adapters(start) else start


def read_with_base(path: str | Path) -> StartPoint:
    """`read_start`, of adapters with the weights under them."""
    start = read_start(path)
    return with_base(start, start.run.init_from)


def _find_base(start: StartPoint, given: str | None) -> Path:
    """Where the base of an adapter checkpoint lies now: where it did, else where `given` says."""
    recorded = recorded_base(start)
    for path in (recorded.path, given):
        if path is not None and Path(path).exists():
            return Path(path)
    raise UserError(
        f"{start.path}: holds adapters of {recorded.path}, which is not there any more; say where it is with "
        "init_from=PATH"
    )


def recorded_base(start: StartPoint) -> Base:
    """What an adapter checkpoint says about its base."""
    entry = start.state.get(_KEY)
    if not isinstance(entry, dict) or set(entry) != {"path", "sha256"}:
        raise UserError(
            f"{start.path}: not a checkpoint of adapters; give one that was trained with lora.rank"
        )
    return Base(**entry)


def check_base(start: StartPoint, found: Base) -> None:
    """Refuse other weights than those that the adapters were trained on."""
    recorded = recorded_base(start)
    if found.sha256 != recorded.sha256:
        raise UserError(
            f"{start.path}: its adapters belong to other weights than those of {found.path} (sha256 "
            f"{recorded.sha256[:12]}…, not {found.sha256[:12]}…); give their base as init_from"
        )


def check_adapters(start: StartPoint, lora: LoRAConfig) -> None:
    """Refuse adapters of another form than the configuration's; dropout may differ.

    Raises:
        UserError: Naming the key.
    """
    theirs = start.run.lora
    for key in ("rank", "alpha", "target_modules", "use_rslora", "use_dora"):
        if (value := getattr(theirs, key)) != (own := getattr(lora, key)):
            raise UserError(
                f"{start.path}: its adapters have lora.{key}={value}, the configuration says {own}; set "
                f"lora.{key}={'null' if value is None else value}"
            )
