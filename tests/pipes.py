"""Streams as a shell hands them to a command."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def pipe(content: bytes) -> Iterator[str]:
    """The reading end of a pipe into which `content` is written, as a process substitution is named."""
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
        writer.join()


@contextmanager
def standard_input(content: bytes) -> Iterator[None]:
    """A pipe with `content` in the place of this process's standard input."""
    before = os.dup(0)
    with pipe(content) as path:
        os.dup2(int(Path(path).name), 0)
        try:
            yield
        finally:
            os.dup2(before, 0)
            os.close(before)
