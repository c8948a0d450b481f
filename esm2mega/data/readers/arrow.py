"""Reads files with pyarrow, whose absence and whose errors become one line; needs the extra `parquet`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from esm2mega.errors import UserError


@contextmanager
def readable(path: Path, kind: str, module: str, cure: str) -> Iterator[Any]:
    """Give the module of pyarrow that reads a file, and name the file if it cannot be read in the block.

    Args:
        path: The file.
        kind: Name of its format.
        module: Name of the module in pyarrow.
        cure: What the user can do about a damaged file.

    Raises:
        UserError: pyarrow is not installed, or the file turns out, anywhere in the block, to be damaged.
    """
    try:
        errors, reader = import_module("pyarrow").ArrowException, import_module(f"pyarrow.{module}")
    except ImportError:
        raise UserError(
            f"{path}: reading {kind} needs pyarrow; install it with `pip install 'esm2mega[parquet]'`"
        ) from None
    try:
        yield reader
    except (errors, OSError, EOFError, UnicodeDecodeError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not a readable {kind} file ({reason}); {cure}") from None
