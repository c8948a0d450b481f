"""Lists the formats by name, and finds the one that a path is in.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from esm2mega.convert.files.source import SourceFiles
from esm2mega.errors import UserError

if TYPE_CHECKING:
    from esm2mega.convert.lazy_weights import Weights

READABLE = {
    "esm2mega": "esm2mega",
    "hf": "hf",
    "fair-esm": "fair_esm",
    "te": "te",
    "nemo2": "nemo2",
    "nemo1": "nemo1",
    "cerebras": "cerebras",
    "tape": "tape",
    "proteinlm": "proteinlm",
    "megatron": "megatron",
}
"""The keys are the names of the formats as users write them, the values are the modules of this package."""

WRITABLE = ("esm2mega", "hf", "fair-esm", "te", "nemo2", "cerebras", "tape", "proteinlm")


WITH_OTHER_HEADS = ("esm2mega", "hf", "cerebras", "tape", "proteinlm")
"""These formats can hold the head of a task in place of the masked-language-model head, or no head at all."""


class Format(Protocol):
    """Declares what the module of each format offers.

    Only formats in `WRITABLE` have `write` and `FAMILIES`, the model families that the format can hold; only
    those of them that are files have `beside`.
    """

    IS_DIRECTORY: bool
    FAMILIES: tuple[str, ...]

    def matches(self, source: SourceFiles) -> bool:
        """Tell whether `source` looks like this format."""

    def read(self, source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
        """Open `source`; tensors matching the shell patterns of `drop` may be left out.

        With `partial`, a part of the model is enough; see `esm2mega.convert.reading.from_store`.
        """

    def beside(self, path: Path) -> list[Path]:
        """Return the files that `write` makes beside the file `path`."""

    def write(self, weights: Weights, path: Path) -> None:
        """Write into the empty directory `path`, or to the file `path` and files beside it."""


def load_format(name: str) -> Format:
    """Import and return the module of a format."""
    return cast(Format, import_module(f"esm2mega.convert.formats.{READABLE[name]}"))


def find_format(source: SourceFiles) -> str | None:
    """Return the name of the format that `source` is in; None if it is in none, or nothing is there."""
    return next((name for name in READABLE if load_format(name).matches(source)), None)


def detect(source: SourceFiles) -> str:
    """Return the name of the format that `source` is in.

    Raises:
        UserError: Nothing is there, or it is in none of the formats; the message says what else it is.
    """
    if not source.path.exists():
        raise UserError(f"{source.path}: no such file or directory")
    if (name := find_format(source)) is not None:
        return name
    from esm2mega.convert.unknown import explanation

    raise UserError(
        explanation(source)
        or f"{source.path}: in none of the formats {', '.join(READABLE)}; if it is in one of them and has an "
        "unusual name, `esm2mega convert --from FORMAT` reads it"
    )


def open_weights(path: Path, name: str | None = None, drop: Sequence[str] = ()) -> Weights:
    """Read a checkpoint in any format.

    Args:
        path: File or directory.
        name: Its format; None to detect it.
        drop: Shell patterns of tensors that have no known meaning and are left out.

    Raises:
        UserError: The checkpoint is not readable, not of a supported model or incomplete, or has tensors
            without a place.
    """
    if name is not None and not path.exists():
        raise UserError(f"{path}: no such file or directory")
    source = SourceFiles(path)
    return read_weights(source, name or detect(source), drop)


def read_weights(source: SourceFiles, name: str, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read a checkpoint whose format is known; the arguments are those of `Format.read`."""
    weights = load_format(name).read(source, drop, partial)
    weights.origin |= {"format": name, "path": str(source.path)}
    return weights
