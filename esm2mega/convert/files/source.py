"""Opens the files of a checkpoint once for all formats that check whether it is theirs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from esm2mega.errors import UserError
from esm2mega.files import parse_json

OF_TRANSFORMERS = (".safetensors", ".bin")
"""Files of tensors whose names end so are described by a ``config.json`` beside them."""

OF_PYTORCH = (*OF_TRANSFORMERS, ".pt", ".pth", ".ckpt")
"""Files of tensors have names that end so."""


class SourceFiles:
    """Holds a path that may be a checkpoint, and reads a file that several formats ask for only once.

    Attributes:
        path: File or directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def has_config(self) -> bool:
        """Tell whether a ``config.json`` is in the directory, or beside a file as transformers names them."""
        return (self.path.is_dir() or self.path.suffix in OF_TRANSFORMERS) and self.config_file.is_file()

    @property
    def folder(self) -> Path:
        """Return the directory that the path is, or that the file lies in."""
        return self.path.parent if self.path.is_file() else self.path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the content of ``config.json``.

        Raises:
            UserError: The file is missing, or does not hold a JSON object.
        """
        if not self.config_file.is_file():
            raise UserError(
                f"{self.config_file}: no such file; copy it from where {self.path.name} comes from"
            )
        try:
            config = parse_json(self.config_file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config_file}: cannot be read as JSON ({error})") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.config_file}: not a JSON object")
        return config
