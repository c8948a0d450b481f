"""Resolves the output that a user names: its format, whether it exists already, and how it is finished."""

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
"""Says what to do about an output that exists already: refuse, go on with it, or replace it."""


_HDF5 = ("hdf5", "bionemo")
"""Names the formats that are files of HDF5."""


@dataclass(frozen=True)
class OutputTarget(ABC):
    """Says where an output goes, and in which format.

    Attributes:
        out: Path as the user named it.
        format: Name of the format. Processes write directly into an ``hdf5`` file; all other formats are made
            from the finished arrays in the end.
    """

    out: Path
    format: str

    @property
    def work_dir(self) -> Path:
        """Return the directory in which the output grows."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def finals(self) -> Mapping[str, Path]:
        """Return the paths that the finished output will have, by what they hold."""
        return {"": self.out}

    def existing(self) -> list[Path]:
        """Return the paths of `finals` that exist already."""
        return [path for path in self.finals.values() if path.exists()]

    def create(self, path: Path, contents: Contents) -> dict[str, int]:
        """Make the file that the arrays are written into, and return the byte at which each begins."""
        if self.format == "hdf5":
            from esm2mega.infer.hdf5 import create_ragged

            return create_ragged(path, contents)
        from esm2mega.infer.arrays import plain_offsets

        path.touch(exist_ok=False)
        offsets = plain_offsets(contents.specs)
        os.truncate(path, sum(-(-spec.num_bytes // 64) * 64 for spec in contents.specs.values()))
        return offsets

    def finish(self, path: Path, contents: Contents, arrays: ArrayFile) -> list[Path]:
        """Make the output from the finished arrays, give it its name, and return its paths.

        The ragged HDF5 file is the file of the arrays, so it is only renamed. Other formats are written in
        one pass over the arrays. An output that is there is replaced, and what has grown outlives an error,
        to be gone on with; `files.appearing` does neither.

        Raises:
            UserError: What an earlier start left is damaged.
        """
        if self.format == "hdf5":
            from esm2mega.infer.hdf5_checksums import complete

            complete(path, arrays)
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
        """Read the attributes of a finished output; they are empty if another program or format wrote it."""
        try:
            found = self._reader()(path)
        except (OSError, ValueError, KeyError):
            return {}
        return found if isinstance(found, dict) else {}

    def verify(self, path: Path) -> None:
        """Compare a finished output with its checksums, where its format has some.

        Raises:
            UserError: It differs.
        """
        if self.format in _HDF5:
            from esm2mega.infer.hdf5_checksums import verify

            verify(path)

    @abstractmethod
    def _writer(self, kind: str) -> Callable[[Path, Any, ArrayFile], None]:
        """Return the function that writes a format other than HDF5; `kind` is a key of `finals`."""

    @abstractmethod
    def _reader(self) -> Callable[[Path], dict[str, Any]]:
        """Return the function that reads the attributes of a file of the format."""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
