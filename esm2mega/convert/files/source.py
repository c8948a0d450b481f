"""Opens the files of a checkpoint once for all formats that check whether it is theirs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from esm2mega.errors import UserError
from esm2mega.files import parse_json


class SourceFiles:
    """Holds a path that may be a checkpoint, and reads a file that several formats ask for only once.

    Attributes:
        path: File or directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def has_config(self) -> bool:
        """Tell whether the path is a directory with a ``config.json``."""
        return self.config_file.is_file()

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the content of ``config.json`` of a directory.

        Raises:
            UserError: The file is missing, or does not hold a JSON object.
        """
        try:
            config = parse_json(self.config_file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config_file}: cannot be read as JSON ({error})") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.config_file}: not a JSON object")
        return config
