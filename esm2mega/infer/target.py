"""Resolves the output that a user names: its format, whether it is there already, how it is finished."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from esm2mega.infer.arrays import ArrayFile
    from esm2mega.infer.contents import Contents

Mode = Literal["new", "resume", "overwrite"]
"""What is done about an output that is there: refused, gone on with, replaced."""


@dataclass(frozen=True)
class OutputTarget(ABC):
    """Where an output goes, and in which format.

    Attributes:
        out: As the user named it.
        format: ``hdf5`` is the file into which processes write; all others are made of it in the end.
    """

    out: Path
    format: str

    @property
    def work_dir(self) -> Path:
        """Where the output grows."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def finals(self) -> Mapping[str, Path]:
        """What will lie there in the end, by what it holds."""
        return {"": self.out}

    def existing(self) -> list[Path]:
        """What lies there already."""
        return [path for path in self.finals.values() if path.exists()]

    def create(self, path: Path, contents: Contents) -> dict[str, int]:
        """Make the file that the arrays are written into; returns where each begins."""
        if self.format == "hdf5":
            from esm2mega.infer.hdf5 import create_ragged

            return create_ragged(path, contents)
        from esm2mega.infer.arrays import plain_offsets

        path.touch(exist_ok=False)
        offsets = plain_offsets(contents.specs)
        os.truncate(path, sum(-(-spec.num_bytes // 64) * 64 for spec in contents.specs.values()))
        return offsets

    def finish(self, path: Path, contents: Contents, arrays: ArrayFile) -> list[Path]:
        """Make the output of the finished arrays and give it its name; returns what is there now.

        The ragged HDF5 file is the file of the arrays, so it is only renamed. Other formats are written in
        one pass over the arrays. An output that is there is replaced, and what has grown outlives an error,
        to be gone on with; `files.appearing` does neither.
        """
        for kind, final in self.finals.items():
            made = path
            if self.format != "hdf5":
                made = path.with_name(f"{final.name}.made")
                _remove(made)
                self._writer(kind)(made, contents, arrays)
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(made, final)
        return list(self.finals.values())

    def attributes(self, path: Path) -> dict[str, Any]:
        """The attributes of a finished output; empty if something else lies there, or a format without."""
        try:
            return self._reader()(path)
        except (OSError, ValueError, KeyError):
            return {}

    @abstractmethod
    def _writer(self, kind: str) -> Callable[[Path, Any, ArrayFile], None]:
        """What writes a format other than HDF5; `kind` is a key of `finals`."""

    @abstractmethod
    def _reader(self) -> Callable[[Path], dict[str, Any]]:
        """What reads the attributes of a file of the format."""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
