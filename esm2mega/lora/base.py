"""Which weights adapters belong to: where they lie, and a checksum that tells them from all others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.tensors import combined_sha256, tensor_sha256
from esm2mega.config.schema import LoRAConfig, Run
from esm2mega.convert.formats.esm2mega import is_auxiliary
from esm2mega.convert.formats.registry import open_weights
from esm2mega.errors import UserError

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


def needs_base(checkpoint: Path) -> bool:
    """Whether a complete checkpoint holds adapters without the weights under them."""
    return _KEY in layout.read_state(checkpoint)


def identify(path: Path) -> Base:
    """Read all weights of a checkpoint in any format, and say which they are."""
    weights = open_weights(path)
    kept = is_auxiliary(weights.description)
    names = sorted(name for name in weights.infos if not kept(name))
    return Base(
        str(path.resolve()), combined_sha256((name, tensor_sha256(weights.read(name))) for name in names)
    )


def find_base(checkpoint: Path, run: Run) -> Path:
    """Where the base of an adapter checkpoint lies now: where it did, else where `init_from` says.

    Raises:
        UserError: In neither place.
    """
    recorded = recorded_base(checkpoint)
    places = [recorded.path, *([run.init_from] if run.init_from is not None else [])]
    for location in places:
        if Path(location).exists():
            return Path(location)
    raise UserError(
        f"{checkpoint}: holds adapters of {recorded.path}, which is not there any more; say where it is with "
        "init_from=PATH"
    )


def recorded_base(checkpoint: Path) -> Base:
    """What an adapter checkpoint says about its base."""
    entry = layout.read_state(checkpoint).get(_KEY)
    if not isinstance(entry, dict) or set(entry) != {"path", "sha256"}:
        raise UserError(
            f"{checkpoint}: not a checkpoint of adapters; give one that was trained with lora.rank"
        )
    return Base(**entry)


def check_base(checkpoint: Path, found: Base) -> None:
    """Refuse other weights than those that the adapters were trained on."""
    recorded = recorded_base(checkpoint)
    if found.sha256 != recorded.sha256:
        raise UserError(
            f"{checkpoint}: its adapters belong to other weights than those of {found.path} (sha256 "
            f"{recorded.sha256[:12]}…, not {found.sha256[:12]}…); give their base as init_from"
        )


def check_adapters(checkpoint: Path, lora: LoRAConfig) -> None:
    """Refuse adapters of another form than the configuration's; dropout may differ.

    Raises:
        UserError: Naming the key.
    """
    theirs = layout.read_config(checkpoint).lora
    for key in ("rank", "alpha", "target_modules", "use_rslora", "use_dora"):
        if (value := getattr(theirs, key)) != (own := getattr(lora, key)):
            raise UserError(
                f"{checkpoint}: its adapters have lora.{key}={value}, the configuration says {own}; set "
                f"lora.{key}={'null' if value is None else value}"
            )
