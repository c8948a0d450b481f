"""The output as the user names it: which format that means, whether it is there already, and how it is
finished.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm2mega.config.infer import absolute_layers
from esm2mega.config.schema import Run
from esm2mega.errors import UserError

if TYPE_CHECKING:
    from esm2mega.infer.arrays import ArrayFile
    from esm2mega.infer.contents import Contents

MODES = ("new", "resume", "overwrite")
"""What is done about an output that is there: refused, gone on with, replaced."""

_ENDINGS = {".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz", ".parquet": "parquet", ".pq": "parquet", "": "pt"}


@dataclass(frozen=True)
class OutputTarget:
    """Where an output goes, and in which format: ``hdf5``, ``bionemo``, ``npz``, ``parquet`` or ``pt``."""

    out: Path
    format: str

    @classmethod
    def of(cls, out: str | Path, run: Run) -> OutputTarget:
        """By the ending of the name.

        Raises:
            UserError: An unknown ending, or something that the format cannot hold.
        """
        path = Path(out)
        if path.name in ("", ".."):
            raise UserError(f"--out {out}: is no name of a file or folder to make; give one")
        kind = _ENDINGS.get(path.suffix.lower())
        if kind is None:
            raise UserError(
                f"--out {out}: unknown ending {path.suffix!r}; .h5, .npz and .parquet are files, a "
                "name without "
                "ending is a folder of .pt files"
            )
        infer = run.infer
        if infer.layout == "bionemo":
            if kind != "hdf5":
                raise UserError(f"--layout bionemo is a layout of HDF5 files; give --out NAME.h5, not {out}")
            if {"logits", "contacts"} & set(infer.outputs) or len(absolute_layers(run)) != 1:
                raise UserError("--layout bionemo holds residue and pooled of one layer; use --layout ragged")
            if infer.dtype == "bf16":
                raise UserError(
                    "--layout bionemo is read by programs that know no bf16; set --dtype fp32 or fp16"
                )
            kind = "bionemo"
        if kind == "parquet":
            from esm2mega.infer.exports import check_parquet

            check_parquet()
            if infer.dtype == "bf16":
                raise UserError("Parquet has no bf16; set --dtype fp32 or fp16")
        return cls(path, kind)

    @property
    def work_dir(self) -> Path:
        """Where the output grows."""
        return self.out.with_name(f"{self.out.name}.partial")

    def finals(self, outputs: list[str]) -> dict[str, Path]:
        """What will lie there in the end, by what it holds."""
        if self.format != "bionemo":
            return {"": self.out}
        from esm2mega.infer.hdf5 import bionemo_paths

        return {kind: path for kind, path in bionemo_paths(self.out).items() if kind in outputs}

    def existing(self, outputs: list[str]) -> list[Path]:
        """What lies there already."""
        return [path for path in self.finals(outputs).values() if path.exists()]

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
        one pass over the arrays.
        """
        finals = self.finals(contents.run.infer.outputs)
        for kind, final in finals.items():
            made = path
            if self.format != "hdf5":
                made = path.with_name(f"{final.name}.made")
                _remove(made)
                self._writer(kind)(made, contents, arrays)
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(made, final)
        return list(finals.values())

    def _writer(self, kind: str) -> Callable[[Path, Contents, ArrayFile], None]:
        from esm2mega.infer import exports, hdf5

        if self.format == "bionemo":
            return lambda path, contents, arrays: hdf5.write_bionemo(path, kind, contents, arrays)
        return {"npz": exports.write_npz, "parquet": exports.write_parquet, "pt": exports.write_pt}[
            self.format
        ]

    def attributes(self, path: Path) -> dict[str, Any]:
        """The attributes of a finished output; empty if something else lies there."""
        from esm2mega.infer import exports, hdf5

        readers: dict[str, Callable[[Path], dict[str, Any]]] = {
            "hdf5": hdf5.read_attributes,
            "bionemo": hdf5.read_attributes,
            "npz": exports.read_npz_attributes,
            "parquet": exports.read_parquet_attributes,
            "pt": exports.read_pt_attributes,
        }
        try:
            return readers[self.format](path)
        except (OSError, ValueError, KeyError):
            return {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
