"""Copies streams, such as standard input, to temporary files, since inputs are read more than once.

The ending of a copy's name says the format of its content, since names decide how files are read.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from esm2mega.data.readers.sources import is_known_ending
from esm2mega.data.readers.text import open_text
from esm2mega.errors import MachineError, UserError
from esm2mega.files import STANDARD_INPUT, is_stream

_OPEN_FILE = re.compile(r"/dev/stdin|(?:/dev|/proc/self)/fd/(\d+)")
_HEAD_BYTES = 1 << 20
_COPIED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Spooled:
    """Holds the files to read in the place of what the user named.

    Attributes:
        paths: The files, in the order of the names.
        names: What the user named, by the temporary file that holds its content.
    """

    paths: list[Path]
    names: dict[str, str]

    def shown(self, text: str) -> str:
        """Return a message with the names that the user gave in the place of temporary files."""
        for path, name in self.names.items():
            text = text.replace(path, name)
        return text


@contextmanager
def spooled(paths: Sequence[str | Path], sequence_column: str = "sequence") -> Iterator[Spooled]:
    """Yield regular files with the content of `paths`; one process calls this.

    Args:
        paths: Files, directories or streams: ``-`` for standard input, pipes, process substitutions.
        sequence_column: Column of the sequences, by which a table with a single column is recognised.

    Raises:
        UserError: A stream cannot be read. Errors of the block name the streams as the user did.
        MachineError: The temporary directory is full.
    """
    with tempfile.TemporaryDirectory(prefix="esm2mega-") as folder:
        found = Spooled([], {})
        for number, path in enumerate(paths):
            if not _must_be_copied(path):
                found.paths.append(Path(path))
                continue
            copy = _named_by_content(_copy(path, Path(folder) / str(number)), sequence_column)
            found.names[str(copy)] = str(path)
            found.paths.append(copy)
        try:
            yield found
        except UserError as error:
            shown = found.shown(str(error))
            if shown == str(error):
                raise
            raise type(error)(shown) from error


def _must_be_copied(path: str | Path) -> bool:
    """Tell whether a path is a stream, or a file under a name that says nothing of its format."""
    opened = _OPEN_FILE.fullmatch(str(path))
    # torchrun closes all but the standard streams of its processes, where the same number means another file.
    if opened and opened[1] not in (None, "0") and ("RANK" in os.environ or not os.path.exists(path)):
        raise UserError(
            f"{path}: is not open in this process; torchrun hands no process substitution on: pipe the input "
            f"into the command, and give {STANDARD_INPUT} as its name"
        )
    return is_stream(path) or bool(opened and os.path.isfile(path))


def _copy(path: str | Path, folder: Path) -> Path:
    """Copy a stream to a file in `folder`, under its own name."""
    is_input = str(path) in (STANDARD_INPUT, "/dev/stdin")
    target = folder / ("stdin" if is_input else Path(path).name)
    folder.mkdir()
    try:
        # Read through the open descriptor: a pipe has one reader, and a socket no name to open again.
        source: BinaryIO = os.fdopen(os.dup(0), "rb") if is_input else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    with source:
        try:
            with target.open("wb") as file:
                shutil.copyfileobj(source, file, _COPIED_AT_ONCE)
        except OSError as error:
            raise MachineError(
                f"{path}: cannot be copied to {folder.parent} ({error.strerror or error}); let TMPDIR name a "
                "folder with more room, or write the input to a file"
            ) from None
    return target


def _named_by_content(file: Path, sequence_column: str) -> Path:
    """Rename a file so that its ending says the format of its content, unless its own name says it."""
    if is_known_ending(file):
        return file
    return file.rename(file.with_name(f"{file.name}{_ending(file, sequence_column)}"))


def _ending(file: Path, sequence_column: str) -> str:
    with file.open("rb") as raw:
        if raw.read(4) == b"PAR1":
            return ".parquet"
    with open_text(file) as text:
        line = b"\n"
        while line and line.isspace():
            line = text.readline(_HEAD_BYTES)
    start = line.strip()
    if start.startswith(b">") or not start:
        return ".fasta"
    if start.startswith((b"{", b"[")):
        return ".jsonl"
    # A line of residues alone holds no delimiter; the reader of FASTA says what it is not.
    is_table = any(delimiter in start for delimiter in b",\t;") or start == sequence_column.encode()
    return ".csv" if is_table else ".fasta"
